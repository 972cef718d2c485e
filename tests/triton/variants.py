"""Which kernels a server would compile, and when: every launch is named as Triton would, and nothing is run.

Triton decides when it is imported whether it interprets, so this is a process of its own, as `machine_code.py` is:
`late_variants(mode)` starts it. Knows nothing of what kernels compute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tests.triton.machine_code import run_apart

SEQUENCES, TOKENS, PAGES = 12, 511, 2
MODES: dict[str, dict[str, bool]] = {
    "graphs": {},
    "batch-invariant": {"batch_invariant": True},
    "eager": {"enforce_eager": True},
    "by modules": {"enforce_eager": True},  # layers that are not taken over, whose kernels no trial compiles
}


def late_variants(mode: str) -> dict[str, Any]:
    """How many variants there were before requests came ("early"), and the later ones by the step that needed them."""
    found: dict[str, Any] = json.loads(run_apart(__name__, mode).splitlines()[-1])
    return found


@contextmanager
def _noted() -> Iterator[set[str]]:
    """The names of all that is launched, for a Hopper: what Triton's own look-up of a compiled kernel goes by."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend, found = make_backend(GPUTarget("cuda", 90, 32)), set()

    @cache
    def binder(kernel: JITFunction[Any]) -> Any:
        return create_function_from_signature(kernel.signature, kernel.params, backend)

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        _, specialization, options = binder(kernel)(*args, **kwargs)
        found.add(f"{kernel.__name__} {specialization} {options}")

    with patch.object(JITFunction, "run", run):
        yield found


def _main(mode: str) -> dict[str, Any]:
    import numpy as np
    import torch

    from adapters.pool import Pool
    from kernels.plans import FILL
    from server.config import Settings
    from server.model.cuda import cuda_kernels
    from server.model.device_runner import DeviceRunner
    from server.model.kv_cache import KVCache
    from server.model.servable import make_servable
    from server.startup import make_runner
    from tests.bench.gpu_model import random_llama
    from tests.bench.random_llama import Shape
    from tests.fake_cuda import fake_device

    settings = Settings(
        model="x",
        max_num_seqs=SEQUENCES,
        max_num_batched_tokens=TOKENS,
        max_lora_rank=16 * PAGES,
        **MODES[mode],
    )
    shape = Shape(layers=1, hidden=256, intermediate=2048, heads=8, kv_heads=2, vocabulary=96)
    cpu = torch.device("cpu")
    with ExitStack() as stack:
        found = stack.enter_context(_noted())
        stack.enter_context(fake_device())
        stack.enter_context(patch("kernels.plans.FILL", FILL))  # of a GPU: nothing is run
        # trials compare numbers, and there are none
        for trial in ("steady._near", "compiled_layer._alike", "probe._alike"):
            stack.enter_context(patch(f"server.model.{trial}", lambda *_: True))
        if mode == "by modules":
            for install in ("install_compiled_layers", "install_compiled_stacks"):
                stack.enter_context(patch(f"server.model.servable.{install}", lambda *_: None))
        servable = make_servable(
            random_llama(shape, cpu), kernels=cuda_kernels(cpu, fixed=settings.batch_invariant)
        )
        groups = servable.layout.groups
        pool = Pool(servable.layout, dict.fromkeys(groups, 8), servable.dtype, cpu)
        servable.attach(pool.sites)
        cache = KVCache.allocate(
            servable.attention, blocks=99, block_size=16, dtype=servable.dtype, device=cpu
        )
        plan: Any = SimpleNamespace(pages=dict.fromkeys(groups, 8), max_model_len=1024)
        runner = make_runner(settings, servable, cache, plan)
        assert isinstance(runner, DeviceRunner)
        runner.capture(lambda done, total: None)
        early, late = set(found), {}
        for name, inputs in _steps(list(groups), np.random.default_rng(0)):
            found.clear()
            runner.forward(inputs)
            if found - early:
                late[name] = sorted(found - early)
    return {"early": len(early), "late": late}


def _steps(groups: list[str], draw: Any) -> Iterator[tuple[str, Any]]:
    """Prompts alone and all kinds of mixtures, with logprobs of every row and of the last rows alone."""
    import numpy as np

    lengths = [[n] for n in (1, 16, 37, 64, 65, 100, 128, 129, 256, 257, 300, TOKENS)]
    lengths += [[1] * n for n in range(2, SEQUENCES + 1)]
    for _ in range(15):
        parts = draw.integers(1, TOKENS // SEQUENCES, draw.integers(2, SEQUENCES + 1))
        lengths.append([int(n) for n in parts])
    for each in lengths:
        for pages in range(PAGES + 1):
            for scored in (False, True):
                rows = np.arange(sum(each)) if scored else np.cumsum(each) - 1
                name = f"{each}, {pages} pages" + (", scored" if scored else "")
                for before in (0, 255, 5000):
                    said = f", after {before}" if before else ""
                    yield name + said, _step(each, groups, pages, rows, before)


def _step(lengths: list[int], groups: list[str], pages: int, wanted: Any, before: int) -> Any:
    """Every other text has an adapter, or the only one; the first is longer by what was there before."""
    import numpy as np

    from kernels.segments import Segment, Span
    from server.model.runner import StepInputs

    ends = np.cumsum(lengths).tolist()
    keys = [lengths[0] + before, *lengths[1:]]
    spans = tuple(
        Span(end - n, end, held, tuple(range(1, 2 + held // 16)))
        for n, end, held in zip(lengths, ends, keys, strict=True)
    )
    segments = tuple(
        Segment(span.start, span.end, tuple(range(pages)), (1.0,) * pages) for span in spans[::2] if pages
    )
    zeros = np.zeros(ends[-1], np.int64)
    return StepInputs(zeros, zeros, zeros, wanted, spans, dict.fromkeys(groups, segments))


if __name__ == "__main__":
    print(json.dumps(_main(sys.argv[1])))
