"""The server's code for a GPU on the CPU: the interpreter runs its kernels, a recorder stands for streams and graphs.

What is shown: the same logits as the CPU's own path, replayed steps equal to eager ones, and nothing waited for.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from adapters.pool import Pool
from kernels.segments import Segment, Span
from server.model.cuda import TritonLinear, cuda_kernels
from server.model.device_runner import DeviceRunner
from server.model.graphs import GraphSizes
from server.model.kernel_set import plain
from server.model.kv_cache import KVCache
from server.model.runner import Runner, StepInputs
from server.model.servable import make_servable
from server.model.stand_ins import of_every_kind
from tests.equivalence.models import held_model
from tests.fake_cuda import fake_device
from tests.model.tiny import SIZES, make_model

CPU = torch.device("cpu")
BLOCK, BLOCKS, PAGES = 16, 24, 6


@pytest.fixture
def cuda():
    """A recorder in place of torch.cuda."""
    with fake_device() as fake:
        yield fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("base")
    make_model(num_hidden_layers=1, intermediate_size=64).save_pretrained(made)
    return made


def servable_of(folder, kernels, how="nf4"):
    """One base, its pages of adapters filled with the same numbers whoever computes."""
    servable = make_servable(held_model(folder, how), kernels=kernels)
    pool = Pool(servable.layout, dict.fromkeys(servable.layout.groups, PAGES), servable.dtype, CPU)
    generator = torch.Generator().manual_seed(4)
    for site in pool.sites:
        for tensor in (site.a, site.b):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        site.scale.copy_(torch.rand(site.scale.shape, generator=generator))
    servable.attach(pool.sites)
    return servable


def cache_of(servable):
    return KVCache.allocate(
        servable.attention, blocks=BLOCKS, block_size=BLOCK, dtype=servable.dtype, device=CPU
    )


def prompts(lengths, groups, adapters=True):
    """A step that reads whole prompts of so many tokens, the first without an adapter, all logits wanted."""
    row, spans, segments, ids = 0, [], [], []
    for number, length in enumerate(lengths):
        blocks = tuple(range(1 + 3 * number, 4 + 3 * number))
        spans.append(Span(row, row + length, length, blocks))
        ids += [(7 * number + at) % 50 + 3 for at in range(length)]
        if number and adapters:
            pages = (number % PAGES, (number + 2) % PAGES)[: 1 + number % 2]
            segments.append(Segment(row, row + length, pages, (1.0, 0.5)[: len(pages)]))
        row += length
    at = np.concatenate([np.arange(length) for length in lengths])
    kv = np.concatenate([np.arange(n) + (1 + 3 * i) * BLOCK for i, n in enumerate(lengths)])
    return StepInputs(
        np.array(ids), at, kv, np.arange(row), tuple(spans), dict.fromkeys(groups, tuple(segments))
    )


def decodes(lengths, groups, adapters=True):
    """The step after it: one more token each."""
    before = prompts([length + 1 for length in lengths], groups, adapters)
    last = [span.end - 1 for span in before.spans]
    spans = tuple(Span(i, i + 1, span.kv_length, span.blocks) for i, span in enumerate(before.spans))
    by_row = [next((s for s in before.segments[groups[0]] if s.start <= row < s.end), None) for row in last]
    segments = tuple(Segment(i, i + 1, s.pages, s.weights) for i, s in enumerate(by_row) if s)
    return StepInputs(
        before.token_ids[last], before.positions[last], before.kv_index[last], np.arange(len(last)), spans,
        dict.fromkeys(groups, segments),
    )  # fmt: skip


def device_runner(servable, sizes=None, fixed=False):
    cache = cache_of(servable)
    layouts = sizes.layouts(servable.layout.groups, cache, servable.heads, fixed) if sizes else ()
    return DeviceRunner(servable, cache, layouts=layouts, fixed=fixed)


LENGTHS = [2, 5, 1]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_logits_are_those_of_plain_pytorch(folder, cuda, adapters, fixed):
    ours = servable_of(folder, cuda_kernels(CPU, fixed=fixed))
    assert all(isinstance(group.base, TritonLinear) for group in ours.groups)
    reference = servable_of(folder, plain())
    groups = list(ours.layout.groups)
    runner, oracle = device_runner(ours, fixed=fixed), Runner(reference, cache_of(reference))
    for step in (prompts(LENGTHS, groups, adapters), decodes(LENGTHS, groups, adapters)):
        got, want = runner.forward(step), oracle.forward(step)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        for (k, v), (k_want, v_want) in zip(runner.cache.layers, oracle.cache.layers, strict=True):
            torch.testing.assert_close(k[BLOCK:], k_want[BLOCK:], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(v[BLOCK:], v_want[BLOCK:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_replay_gives_the_bits_of_the_step_run_as_it_comes(folder, cuda, monkeypatch, adapters):
    """Three sequences in a bucket of four: the fourth row only pads."""
    servable = servable_of(folder, cuda_kernels(CPU, fixed=True))
    groups = list(servable.layout.groups)
    eager = device_runner(servable, fixed=True)
    monkeypatch.setattr("server.model.graphs.BUCKETS", (4, 8))
    graphed = device_runner(servable, GraphSizes(sequences=4, length=40, pages=2), fixed=True)
    told = []
    graphed.capture(lambda done, total: told.append((done, total)))
    graphs = len(graphed._graphs._graphs)
    assert told == [(i + 1, graphs) for i in range(graphs)]
    assert [e[0] for e in cuda.log].count("capture") == graphs == 3, (
        "without adapters, with one page, with two"
    )
    first, second = prompts(LENGTHS, groups, adapters), decodes(LENGTHS, groups, adapters)
    for runner in (eager, graphed):
        runner.forward(first)
    cuda.log.clear()
    got = graphed.forward(second)
    assert [entry[0] for entry in cuda.log] == ["synchronize", "record", "replay"]
    assert torch.equal(got, eager.forward(second))
    assert got.shape == (3, 64)


@pytest.mark.parametrize("adapters", [False, True])
def test_prompts_are_replayed(folder, cuda, adapters):
    """Prompts and a decode in one step: eight rows and one in a bucket of 16, the last row of each wanted."""
    servable, reference = servable_of(folder, cuda_kernels(CPU, fixed=False)), servable_of(folder, plain())
    groups = list(servable.layout.groups)
    graphed = device_runner(servable, GraphSizes(sequences=4, length=40, pages=2, tokens=20))
    eager, oracle = device_runner(servable), Runner(reference, cache_of(reference))
    graphed.capture(lambda *_: None)
    first, whole = prompts([4], groups, adapters), prompts([5, 5, 3], groups, adapters)
    last = np.array([span.end - 1 for span in whole.spans])
    one = [4, *range(5, 13)]  # the fifth token of the first text, the others from their start
    others = (Span(s.start - 4, s.end - 4, s.kv_length, s.blocks) for s in whole.spans[1:])
    spans = (Span(0, 1, 5, whole.spans[0].blocks), *others)
    moved = tuple(Segment(s.start - 4, s.end - 4, s.pages, s.weights) for s in whole.segments[groups[0]])
    second = StepInputs(
        whole.token_ids[one],
        whole.positions[one],
        whole.kv_index[one],
        last - 4,
        spans,
        dict.fromkeys(groups, moved),
    )
    for step in (replace(first, logits_rows=np.array([3])), second):
        want = oracle.forward(step)
        cuda.log.clear()
        got = graphed.forward(replace(step)).clone()
        assert [entry[0] for entry in cuda.log] == ["synchronize", "record", "replay"]
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got, eager.forward(step), rtol=1e-5, atol=1e-5)
        for (k, v), (k_want, v_want) in zip(graphed.cache.layers, oracle.cache.layers, strict=True):
            torch.testing.assert_close(k[BLOCK:], k_want[BLOCK:], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(v[BLOCK:], v_want[BLOCK:], rtol=1e-4, atol=1e-4)


def test_a_step_that_was_prepared_is_sent_with_the_tokens_it_has_then(folder, cuda, monkeypatch):
    """It is written in full before the step before has ended; to be sent it waits for nothing."""
    servable = servable_of(folder, cuda_kernels(CPU, fixed=True))
    groups = list(servable.layout.groups)
    monkeypatch.setattr("server.model.graphs.BUCKETS", (4,))
    plain = device_runner(servable, fixed=True)
    ahead = device_runner(servable, GraphSizes(sequences=4, length=40, pages=2), fixed=True)
    ahead.capture(lambda *_: None)
    first = prompts(LENGTHS, groups)
    plain.forward(first)
    ahead.forward(first)
    segments = decodes(LENGTHS, groups).segments
    for turn in range(5):  # each buffer is used again, with the segments it holds
        lengths = [length + turn for length in LENGTHS]
        step = replace(decodes(lengths, groups), segments=segments)
        made = replace(step, token_ids=np.zeros(3, np.int64))
        assert ahead.prepare(made)
        if turn == 2:  # another comes instead
            other = decodes(LENGTHS, groups, adapters=False)
            assert torch.equal(ahead.forward(other), plain.forward(other))
            assert ahead.prepare(made)
        made.token_ids[:] = step.token_ids
        cuda.log.clear()
        got = ahead.forward(made)
        assert [entry[0] for entry in cuda.log] == ["record", "replay"]
        assert torch.equal(got, plain.forward(step))
    assert torch.equal(ahead.forward(made), plain.forward(step)), "sent twice"


def test_a_step_without_a_graph_is_prepared_too(folder, cuda):
    servable = servable_of(folder, cuda_kernels(CPU, fixed=True))
    runner, plain = device_runner(servable, fixed=True), device_runner(servable, fixed=True)
    step = prompts(LENGTHS, list(servable.layout.groups))
    assert not runner.prepare(step), "the host has most of its work before it"
    cuda.log.clear()
    assert torch.equal(runner.forward(step), plain.forward(replace(step)))
    assert [entry[0] for entry in cuda.log][:1] == ["record"]


def test_steps_are_run_as_they_come_before_any_is_captured(folder, cuda):
    """So that what only they need is compiled before the server is ready, also where nothing is captured."""
    servable = servable_of(folder, cuda_kernels(CPU, fixed=False))
    groups, cache = list(servable.layout.groups), cache_of(servable)
    layouts = GraphSizes(sequences=1, length=40, pages=0).layouts(groups, cache, servable.heads, False)
    steps = of_every_kind(sequences=2, tokens=3, pages=1, groups=groups, block_size=BLOCK)
    assert [(len(s.token_ids), len(s.spans), bool(s.segments)) for s in steps] == [
        (3, 2, True), (2, 2, True), (2, 1, False), (2, 1, True), (2, 1, False), (1, 1, True), (1, 1, False)
    ]  # fmt: skip
    told = []
    for captured in ((), layouts):
        runner = DeviceRunner(servable, cache, layouts=captured, stand_ins=steps)
        told.clear()
        cuda.log.clear()
        runner.capture(lambda done, total: told.append((done, total)))
        whole = len(steps) + len(captured)
        assert told == [(done + 1, whole) for done in range(whole)]
        graphs = [entry[0] for entry in cuda.log].index("capture") if captured else len(cuda.log)
        assert [entry[0] for entry in cuda.log[:graphs]].count("record") == len(steps)
        assert not any(k[BLOCK:].any() for k, _ in cache.layers), "written outside the padding block"


def test_which_steps_are_replayed(folder, cuda):
    servable = servable_of(folder, cuda_kernels(CPU, fixed=False))
    groups = list(servable.layout.groups)
    runner = device_runner(servable, GraphSizes(sequences=2, length=40, pages=1))
    sizes = GraphSizes(sequences=2, length=40, pages=1)
    assert sizes.buckets == (1, 2)
    assert sizes.classes == (0, 1)
    assert GraphSizes(200, 40, 16).buckets[-3:] == (128, 192, 200)
    assert GraphSizes(1000, 40, 16).buckets[-2:] == (192, 256)
    assert GraphSizes(1, 40, 3).classes == (0, 1, 3)
    runner.capture(lambda *_: None)
    find = runner._graphs.find
    assert find(prompts([5], groups)) is None, "a prompt's rows are no decode"
    base = find(decodes([5, 9], groups, adapters=False))
    assert (base.layout.rows, base.pages) == (2, 0)
    assert find(decodes([5, 9], groups)) is None, "an adapter of two pages was not captured"
    assert find(decodes([5, 9, 2], groups, adapters=False)) is None, "three rows were not captured"
    assert (find(decodes([5], groups)).layout.rows, find(decodes([5], groups)).pages) == (1, 0)


def test_which_prompts_are_replayed(folder, cuda):
    servable = servable_of(folder, cuda_kernels(CPU, fixed=False))
    groups = list(servable.layout.groups)
    sizes = GraphSizes(sequences=2, length=40, pages=1, tokens=20)
    assert sizes.prompt_buckets == (16, 20)
    assert GraphSizes(2, 40, 1, tokens=4000).prompt_buckets[-2:] == (1024, 2048)
    assert GraphSizes(2, 40, 1).prompt_buckets == ()
    runner = device_runner(servable, sizes)
    runner.capture(lambda *_: None)

    def prompt(*lengths, wanted=1, adapters=False):
        rows = np.arange(sum(lengths))[-wanted:]
        return runner._graphs.find(replace(prompts(lengths, groups, adapters), logits_rows=rows))

    assert [prompt(n).layout.rows for n in (2, 16, 17, 20)] == [16, 16, 20, 20]
    assert prompt(1).layout.wanted is None, "one token is a decode"
    assert prompt(9, 9, wanted=2).layout.rows == 20
    assert prompt(21) is None, "more rows than were captured"
    assert prompt(5, wanted=3) is None, "as many logits as a prompt's logprobs want"
    assert prompt(3, 3, 3) is None, "more sequences than the server runs"
    assert prompt(5, 5, adapters=True) is None, "an adapter of two pages was not captured"
    fixed = sizes.layouts(groups, runner.cache, servable.heads, True)
    assert all(layout.wanted is None for layout in fixed)


def test_a_rows_bits_are_its_own_where_that_is_asked_for(folder, cuda):
    servable = servable_of(folder, cuda_kernels(CPU, fixed=True), "nf4-bf16")
    groups = list(servable.layout.groups)
    together, alone = device_runner(servable, fixed=True), device_runner(servable, fixed=True)
    among = together.forward(prompts(LENGTHS, groups))
    whole = prompts(LENGTHS, groups)
    first = 0
    for number, length in enumerate(LENGTHS):
        rows = slice(first, first + length)
        mine = {
            group: tuple(
                Segment(s.start - first, s.end - first, s.pages, s.weights)
                for s in segments
                if s.start == first
            )
            for group, segments in whole.segments.items()
        }
        span = whole.spans[number]
        step = StepInputs(
            whole.token_ids[rows], whole.positions[rows], whole.kv_index[rows], np.arange(length),
            (Span(0, length, span.kv_length, span.blocks),), mine,
        )  # fmt: skip
        assert torch.equal(alone.forward(step), among[rows])
        first += length


assert SIZES["hidden_size"] % 64 == 0, "these tests want NF4 blocks that do not straddle rows"
