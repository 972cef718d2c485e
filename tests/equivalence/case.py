"""One architecture held in one way, run as a mixed batch and compared with transformers + peft row by row."""

import copy

import torch
from bitsandbytes.nn import Linear4bit

from kernels.cpu.library import load
from server.model import kernel_set
from server.model.servable import make_servable
from tests.equivalence.harness import Harness, Row, read_peft
from tests.equivalence.models import VOCAB, exact_twin, held_model, plain_model, with_adapters
from tests.equivalence.oracle import divergence, peft_logits, relative_error

EXACT = 1e-5
ARRIVALS = {"second8": 2, "base2": 4}


def mixed_rows() -> dict[str, Row]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "base": (70, 60, None),
        "rank3": (45, 33, "rank3"),
        "rank8": (60, 48, "rank8"),
        "rank16": (30, 21, "rank16"),
        "rank64": (52, 40, "rank64"),
        "second8": (20, 9, "rank8"),
        "base2": (12, 1, None),
    }
    return {
        name: Row(torch.randint(3, VOCAB, (length,), generator=generator).tolist(), prompt, adapter)
        for name, (length, prompt, adapter) in shapes.items()
    }


class Case:
    """One architecture held in one way: our logits, peft's on the same path, and the float64 oracle's."""

    def __init__(
        self, architecture, how, folder, *, backend="exact", compiled=True, avx512_bf16=None, device="cpu"
    ):
        plain = plain_model(architecture)
        plain.save_pretrained(folder / "base")
        held = held_model(folder / "base", how, device)
        self.oracle = with_adapters(exact_twin(held, plain), architecture)
        self.peft = with_adapters(
            self._forced(held_model(folder / "base", how, device), avx512_bf16), architecture
        )
        library = load() if compiled and device == "cpu" else None
        kernels = kernel_set.compiled(library) if library else kernel_set.plain()
        if device == "cuda":
            from server.model.cuda import cuda_kernels  # where there is Triton

            kernels = cuda_kernels(torch.device("cuda"), fixed=False)
        servable = make_servable(self._forced(held, avx512_bf16), backend=backend, kernels=kernels)
        self.rows = mixed_rows()
        adapters = read_peft(with_adapters(copy.deepcopy(plain), architecture), folder / "adapters", servable)
        self.ours = Harness(servable, adapters, device=device).run(self.rows, ARRIVALS)

    @staticmethod
    def _forced(model, avx512_bf16):
        for module in model.modules():
            if isinstance(module, Linear4bit) and avx512_bf16 is not None:
                module.support_avx512bf16_for_cpu = avx512_bf16
        return model

    def rows_checked(self):
        """(name, position, ours) of every row of logits, and nothing left out."""
        for name, row in self.rows.items():
            assert sorted(self.ours[name]) == list(range(row.prompt - 1, len(row.tokens)))
            for position, logits in self.ours[name].items():
                yield name, position, logits

    def stacked(self, name):
        return torch.stack([self.ours[name][at] for at in sorted(self.ours[name])]).cpu()

    def oracle_logits(self, name, adapter):
        return peft_logits(self.oracle, self.rows[name].tokens, adapter)

    def assert_control(self, gate):
        """A wrong adapter and no adapter are each far outside the gate: the test can fail."""
        for name, row in self.rows.items():
            if row.adapter is None:
                continue
            ours = self.stacked(name)
            wrong = "rank16" if row.adapter != "rank16" else "rank8"
            for other in (None, wrong):
                theirs = self.oracle_logits(name, other)[row.prompt - 1 :]
                assert relative_error(ours, theirs) > 10 * gate, f"{name} cannot be told from {other}"


def assert_exact(case: Case):
    """Every row within `EXACT` of the oracle, and far from what it would be with another adapter or none."""
    oracle = {name: case.oracle_logits(name, row.adapter) for name, row in case.rows.items()}
    worst = max(relative_error(logits.cpu(), oracle[name][at]) for name, at, logits in case.rows_checked())
    assert worst <= EXACT
    case.assert_control(EXACT)


def assert_as_good_as_peft(case: Case):
    """Our error against the oracle is at most 1.25 x peft's own on the same path, plus 2e-3; KL under 1e-4."""
    ours, theirs = {}, {}
    for name, row in case.rows.items():
        oracle = case.oracle_logits(name, row.adapter)[row.prompt - 1 :]
        got = case.stacked(name)
        ours[name] = relative_error(got, oracle)
        theirs[name] = relative_error(
            peft_logits(case.peft, row.tokens, row.adapter)[row.prompt - 1 :], oracle
        )
        assert max(divergence(g, o) for g, o in zip(got, oracle, strict=True)) < 1e-4, name
    gate = 1.25 * max(theirs.values()) + 2e-3
    assert max(ours.values()) <= gate
    case.assert_control(gate)
