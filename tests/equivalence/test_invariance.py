"""A row's logits are the same bits alone and among neighbours: other adapters, other lengths, an outlier row."""

import copy

import pytest
import torch

from kernels.cpu.library import INSTRUCTION_SETS, load
from server.model import kernel_set
from server.model.servable import make_servable
from tests.equivalence.harness import Harness, Row, read_peft
from tests.equivalence.models import VOCAB, held_model, plain_model, with_adapters

OUTLIER = 2  # the token whose embedding is a thousand times the others'


def kernel_library(kernels):
    """The compiled kernels for an instruction set, the best there is for "compiled", none for "plain"."""
    if kernels == "plain":
        return None
    best = load()
    if best is None:
        pytest.skip("the kernels are not built here")
    if kernels == "compiled":
        return best
    if kernels not in INSTRUCTION_SETS[: best.isa + 1]:
        pytest.skip(f"this processor has no {kernels}")
    return load(kernels)


HELD = ["fp32 plain", "fp32 compiled", "nf4 avx512", "nf4 avx2", "nf4 portable", "int8 compiled"]


@pytest.fixture(scope="module", params=HELD)
def engine_parts(request, tmp_path_factory):
    how, kernels = request.param.split()
    library = kernel_library(kernels)
    folder = tmp_path_factory.mktemp(how)
    plain = plain_model("llama")
    with torch.no_grad():
        plain.get_input_embeddings().weight[OUTLIER] *= 1000
    plain.save_pretrained(folder / "base")
    servable = make_servable(
        held_model(folder / "base", how),
        kernels=kernel_set.compiled(library) if library else kernel_set.plain(),
    )
    adapters = read_peft(with_adapters(copy.deepcopy(plain), "llama"), folder / "adapters", servable)
    return servable, adapters


def tokens(seed: int, length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = {
    "base": Row(tokens(1, 40), 25, None),
    "rank3": Row(tokens(2, 61), 50, "rank3"),
    "rank64": Row(tokens(3, 30), 7, "rank64"),
}
NEIGHBOURS = {
    "outlier": Row([OUTLIER] * 5 + tokens(4, 20), 10, "rank16"),
    "long": Row(tokens(5, 200), 190, "rank8"),
    "same adapter": Row(tokens(6, 33), 20, "rank64"),
    "bare outlier": Row([*tokens(7, 8), OUTLIER, *tokens(8, 8)], 12, None),
    "short": Row(tokens(9, 12), 1, None),
}


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for position in want:
        assert torch.equal(got[position], want[position]), f"position {position}"


@pytest.mark.parametrize("name", ROWS)
def test_alone_and_among_neighbours(engine_parts, name):
    servable, adapters = engine_parts
    alone = Harness(servable, adapters).run({name: ROWS[name]})
    arrivals = {"long": 1, "same adapter": 3, "bare outlier": 5}
    together = Harness(servable, adapters, tokens=128).run(ROWS | NEIGHBOURS, arrivals)
    assert_same_bits(together[name], alone[name])


def test_neighbours_are_seen_at_all(engine_parts):
    """The outlier row does differ from the others, and an adapter from none: equality above is not by accident."""
    servable, adapters = engine_parts
    plain = Harness(servable, adapters).run({"base": ROWS["base"]})["base"]
    other = Row(ROWS["base"].tokens, ROWS["base"].prompt, "rank3")
    adapted = Harness(servable, adapters).run({"base": other})["base"]
    assert all(not torch.equal(plain[position], adapted[position]) for position in plain)


@pytest.mark.parametrize(("budget", "chunk"), [(32, 16), (64, 64), (256, 128)])
def test_whatever_the_chunks(engine_parts, budget, chunk):
    servable, adapters = engine_parts
    whole = Harness(servable, adapters, tokens=512, chunk=512).run(ROWS)
    cut = Harness(servable, adapters, tokens=budget, chunk=chunk).run(ROWS)
    for name in ROWS:
        assert_same_bits(cut[name], whole[name])


def test_after_a_preemption(engine_parts):
    """Too few blocks for all: the youngest give way and compute their tokens again."""
    servable, adapters = engine_parts
    rows = {f"row {i}": Row(tokens(20 + i, 90), 60, ["rank3", "rank8", None][i % 3]) for i in range(4)}
    alone = {name: Harness(servable, adapters).run({name: row})[name] for name, row in rows.items()}
    tight = Harness(servable, adapters, blocks=20, tokens=96)
    preempted = []
    original = tight.scheduler._preempt
    tight.scheduler._preempt = lambda sequence: (preempted.append(sequence.request_id), original(sequence))
    together = tight.run(rows)
    assert preempted
    for name in rows:
        assert_same_bits(together[name], alone[name])


def test_after_a_prefix_hit(engine_parts):
    """The same beginning again: its blocks are taken up, and every logit is the same bits."""
    servable, adapters = engine_parts
    rows = {
        name: Row(tokens(40, 60) + tokens(41 + i, 20), 70, "rank8") for i, name in enumerate(["one", "two"])
    }
    alone = {name: Harness(servable, adapters).run({name: row})[name] for name, row in rows.items()}
    shared = Harness(servable, adapters)
    first = shared.run({"one": rows["one"]})
    assert shared.scheduler.prefix_hits == 0
    second = shared.run({"two": rows["two"]})
    assert shared.scheduler.prefix_hits == 48  # the three full blocks of 16 that both begin with
    assert_same_bits(first["one"], alone["one"])
    assert_same_bits(second["two"], alone["two"])


def test_a_prefix_is_never_taken_from_another_adapter(engine_parts):
    """The same text under another adapter, and under none, shares nothing: blocks are kept by generation."""
    servable, adapters = engine_parts
    rows = {name: {"row": Row(tokens(50, 60), 50, name)} for name in ("rank8", "rank16", None)}
    alone = {name: Harness(servable, adapters).run(row)["row"] for name, row in rows.items()}
    shared = Harness(servable, adapters)
    for name, row in rows.items():
        assert_same_bits(shared.run(row)["row"], alone[name])
        assert shared.scheduler.prefix_hits == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_whatever_the_threads(engine_parts, threads):
    """A wide step is shared among threads; where one's share ends must not show."""
    servable, adapters = engine_parts
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = Harness(servable, adapters).run({"base": ROWS["base"]})
        together = Harness(servable, adapters, tokens=512, chunk=128).run(ROWS | NEIGHBOURS)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(together["base"], alone["base"])
