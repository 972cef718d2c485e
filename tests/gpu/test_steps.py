"""Whole steps on the device: replays against the same steps run as they come, rows alone and among others."""

import gc
from array import array

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from server.engine.scheduler import Scheduled
from server.heap import return_free_memory
from server.model.cuda import cuda_kernels
from server.model.device_runner import DeviceRunner
from server.model.graphs import BUCKETS, GraphSizes
from server.model.runner import StepInputs
from server.model.servable import make_servable
from server.model.stand_ins import of_every_kind, stand_in
from tests.bench.gpu_model import BLOCK, Engine, random_llama
from tests.bench.random_llama import Shape

CUDA = torch.device("cuda")
SMALL = Shape(layers=2, hidden=512, intermediate=1024, heads=8, kv_heads=2, vocabulary=1000)
LARGE = Shape(layers=4, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=8000)
CONTEXT, LONG = 70, 600


def engine_of(fixed: bool, buckets=()) -> Engine:
    torch.manual_seed(1)
    return Engine(
        random_llama(SMALL, CUDA), cuda_kernels(CUDA, fixed=fixed), adapters=8,
        positions=(BUCKETS[-1] + 1) * (CONTEXT + BLOCK), buckets=buckets, fixed=fixed,
    )  # fmt: skip


def adapters_of(rows: int, adapted: bool) -> list[int | None]:
    """Every third row has none, the others share eight."""
    return [None if row % 3 == 0 or not adapted else row % 8 for row in range(rows)]


def long_text(engine: Engine, adapter: int | None) -> Scheduled:
    """One more token of it, in blocks beyond those of others."""
    (found,) = engine.sequences([adapter], LONG)
    found.sequence.blocks = array("i", range(engine.cache.blocks - -(-LONG // BLOCK), engine.cache.blocks))
    return found


def as_it_comes(runner: DeviceRunner, inputs: StepInputs) -> torch.Tensor:
    """The step of a replay, padded as there, run without its graph."""
    graph = runner._graphs.find(inputs)
    assert graph is not None, "no graph for a decode step"
    host = torch.zeros(graph.layout.size, dtype=torch.int32)
    graph.layout.fill(host.numpy(), inputs)
    with torch.inference_mode():
        return runner._run(graph.layout.view(host.to(CUDA))).float()[: len(inputs.logits_rows)]


def test_a_replay_equals_the_step_as_it_comes_in_every_bucket():
    engine = engine_of(False, BUCKETS)
    kept = [(k.clone(), v.clone()) for k, v in engine.cache.layers]

    def restore() -> None:
        for (k, v), (k_kept, v_kept) in zip(engine.cache.layers, kept, strict=True):
            k.copy_(k_kept)
            v.copy_(v_kept)

    for bucket in BUCKETS:
        for rows in {bucket, max(1, bucket - 1)}:
            for adapted in (False, True):
                inputs = engine.inputs(engine.sequences(adapters_of(rows, adapted), CONTEXT))
                found = []
                for run in (engine.runner.forward, lambda inputs: as_it_comes(engine.runner, inputs)):
                    restore()
                    found.append(run(inputs).clone())
                assert torch.isfinite(found[0]).all()
                assert torch.equal(*found), f"{rows} rows in a bucket of {bucket}, adapters: {adapted}"
                restore()
                assert torch.equal(engine.runner.forward(inputs), found[0]), "the same batch gave other bits"
    engine.pool.check()


def test_the_engines_own_sizes_are_captured():
    engine = engine_of(False)
    sizes = GraphSizes(sequences=5, length=CONTEXT, pages=4)
    layouts = sizes.layouts(engine.servable.layout.groups, engine.cache, engine.servable.heads, False)
    runner = DeviceRunner(engine.servable, engine.cache, layouts=layouts)
    told = []
    runner.capture(lambda done, total: told.append(done))
    assert told == list(range(1, 1 + len(sizes.buckets) * len(sizes.classes)))
    inputs = engine.inputs(engine.sequences([0, 1, 2], CONTEXT))
    assert torch.equal(runner.forward(inputs).clone(), as_it_comes(runner, inputs))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_prompt_needs_no_kernel_that_was_not_compiled_before(fixed, monkeypatch):
    engine = engine_of(fixed)
    case = {"groups": engine.pages.groups, "block_size": BLOCK}
    stand_ins = of_every_kind(sequences=6, tokens=511, pages=1, **case)
    runner = DeviceRunner(engine.servable, engine.cache, stand_ins=stand_ins, fixed=fixed)
    runner.capture(lambda done, total: None)
    compiled, compile_it = [], JITFunction._do_compile
    monkeypatch.setattr(
        JITFunction, "_do_compile", lambda self, *given: compiled.append(self.fn) or compile_it(self, *given)
    )

    @triton.jit
    def unseen(x):
        tl.store(x, 1.0)

    unseen[(1,)](torch.empty(1, device=CUDA))
    assert compiled.pop() is unseen.fn, "what is compiled is not noticed"
    for lengths in ([37], [100], [300], [511], [1, 60, 1, 90], [1] * 6):
        for pages in (0, 1):
            runner.forward(stand_in(lengths, 1, pages=pages, **case))
            assert not compiled, (lengths, pages)


@pytest.mark.parametrize("adapted", [False, True])
def test_prompts_are_replayed_as_they_come(adapted):
    """Prompts, ends of prompts and decodes in one step, padded to a bucket of each kind of product."""
    engine = engine_of(False)
    sizes = GraphSizes(sequences=6, length=CONTEXT, pages=1, tokens=256)
    layouts = sizes.layouts(engine.servable.layout.groups, engine.cache, engine.servable.heads, False)
    runner = DeviceRunner(engine.servable, engine.cache, layouts=layouts)
    runner.capture(lambda done, total: None)
    loose = DeviceRunner(engine.servable, engine.cache)
    for counts in ([3, 1], [70], [1, 20, 1, 30], [60, 1, 33], [70, 70, 1, 5], [64, 64, 64, 64]):
        batch = engine.sequences(adapters_of(len(counts), adapted), CONTEXT)
        for item, count in zip(batch, counts, strict=True):
            item.sequence.computed = CONTEXT - count
        inputs = engine.inputs([Scheduled(i.sequence, c) for i, c in zip(batch, counts, strict=True)])
        assert runner._graphs.find(inputs).layout.wanted is not None
        replayed = runner.forward(inputs).clone()
        assert torch.equal(replayed, as_it_comes(runner, inputs)), counts
        unpadded = loose.forward(inputs)
        assert (replayed - unpadded).norm() < 0.05 * unpadded.norm(), counts


def test_a_long_text_among_short_ones_is_replayed():
    """Its keys are shared out, which the graph was not captured with, and the others' are not."""
    engine = engine_of(False, (8,))
    batch = engine.sequences([None] * 8, CONTEXT)
    batch[-1] = long_text(engine, None)
    inputs = engine.inputs(batch)
    layout = engine.runner._graphs.find(inputs).layout
    used = layout.fill(np.zeros(layout.size, np.int32), inputs).attention
    assert used.tiles == 8 < used.records, "nothing is shared"
    replayed = engine.runner.forward(inputs).clone()
    assert torch.equal(replayed, as_it_comes(engine.runner, inputs))
    assert torch.equal(replayed, engine.runner.forward(inputs)), "the same batch gave other bits"
    for row, item in enumerate(batch):
        alone = engine.runner.forward(engine.inputs([item]))[0]
        assert (replayed[row] - alone).norm() < 0.05 * alone.norm(), f"row {row}"


@pytest.mark.parametrize("adapted", [False, True])
def test_a_row_has_the_same_bits_alone_and_among_others(adapted):
    engine = engine_of(True, (1, 4, 64))
    batch = engine.sequences(adapters_of(64, adapted), CONTEXT)
    batch[-1] = long_text(engine, 0 if adapted else None)
    among = engine.runner.forward(engine.inputs(batch)).clone()
    for rows in ([0], [5], [63], [1, 2, 40]):
        few = engine.runner.forward(engine.inputs([batch[row] for row in rows]))
        for row, logits in zip(rows, few, strict=True):
            assert torch.equal(logits, among[row]), f"row {row}"


def test_torch_keeps_none_of_what_loading_took():
    """Siblings that were joined are more than half of the weights; a memory plan would count them as used.

    Of those below 10 MB, which torch keeps together, holes are left between what stays.
    """

    def kept() -> int:
        return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    gc.collect()
    torch.cuda.empty_cache()
    before = kept()
    model = random_llama(LARGE, CUDA)
    weights = model.get_memory_footprint()
    servable = make_servable(model, kernels=cuda_kernels(CUDA, fixed=False))
    return_free_memory()
    assert kept() - before < 0.25 * weights
    assert servable.model is model


def test_adapters_change_what_they_should():
    engine = engine_of(False, (8,))
    base = engine.runner.forward(engine.inputs(engine.sequences([None] * 8, CONTEXT))).clone()
    mixed = engine.runner.forward(engine.inputs(engine.sequences([None] * 4 + [0, 1, 2, 3], CONTEXT)))
    assert (mixed[:4] - base[:4]).abs().max() < 0.01, "rows without an adapter changed"
    assert (mixed[4:] - base[4:]).abs().amax(dim=1).gt(0.02).all(), "an adapter did nothing"
