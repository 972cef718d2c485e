"""Paged attention of a whole step against its twin and the formula, over a cache that is NaN where nothing was kept."""

import numpy as np
import pytest
import torch

from kernels import attention as kernel
from kernels import plans, reference
from kernels.plans import AttentionPlan, Heads
from kernels.segments import KV_TILE, Span, Spans
from kernels.workspace import Workspace
from tests.kernels.naive import attention, relative_error

GATE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (queries, keys) of the spans of a step
CHUNKS = {
    "decode": [(1, 1), (1, 37), (1, 300)],
    "prompt": [(1, 1), (19, 19)],
    "chunk": [(7, 290)],
    "mixed": [(1, 140), (9, 20), (1, 5)],
    "one is long": [(1, 20), (1, 600), (1, 3), (1, 40)],
}
HEADS = {"one to one": (2, 2), "grouped": (6, 2), "one for all": (4, 1), "many for one": (40, 1)}


class Step:
    def __init__(self, chunks, heads="grouped", dtype=torch.float32, widths=(20, 12), block_size=16):
        query_heads, self.kv_heads = HEADS[heads]
        needed = [-(-keys // block_size) for _, keys in chunks]
        blocks = torch.randperm(sum(needed)) + 1
        self.spans, start = [], 0
        for (queries, keys), ids in zip(chunks, blocks.split(needed), strict=True):
            self.spans.append(Span(start, start + queries, keys, tuple(ids.tolist())))
            start += queries
        self.block_size, positions = block_size, (sum(needed) + 1) * block_size
        # past the last block the twin may look, as far as a tile of its own
        self.k = torch.full((positions + KV_TILE, self.kv_heads, widths[0]), torch.nan, dtype=dtype)
        self.v = torch.full((positions + KV_TILE, self.kv_heads, widths[1]), torch.nan, dtype=dtype)
        for span in self.spans:
            where = [
                span.blocks[at // block_size] * block_size + at % block_size for at in range(span.kv_length)
            ]
            self.k[where] = torch.randn(len(where), *self.k.shape[1:]).to(dtype)
            self.v[where] = torch.randn(len(where), *self.v.shape[1:]).to(dtype)
        self.q = torch.randn(start, query_heads, widths[0]).to(dtype)
        self.plain = {"scale": widths[0] ** -0.5, "window": None, "softcap": None, "sinks": None}

    def plan(self, *, room=None, fixed=False):
        """The step's plan, or one of a bucket of decodes: `room` blocks, and a tile for every row."""
        rows, held = len(self.q), sum(len(span.blocks) for span in self.spans)
        longest = max(span.end - span.start for span in self.spans)
        heads = Heads(self.q.shape[1] // self.kv_heads, self.kv_heads)
        queries, enough = heads.queries(longest, fixed=fixed), heads.enough
        table = np.full(AttentionPlan.sizes(rows, room or held, enough), -(2**30), np.int32)
        _, size = AttentionPlan.fill(table, self.spans, rows, queries, enough, fixed=fixed)
        if room is not None and fixed:
            size = AttentionPlan.most_fixed(rows, enough, room, self.block_size)
        elif room is not None:
            size = AttentionPlan.most(rows, queries, enough)
        buffer = torch.from_numpy(table).to(torch.get_default_device())
        return AttentionPlan.view(buffer, rows, queries, enough, self.block_size, size)

    def ours(self, workspace=None, *, room=None, fixed=False, **asked):
        workspace = workspace or Workspace(torch.get_default_device())
        plan = self.plan(room=room, fixed=fixed)
        out = kernel.attention(self.q, self.k, self.v, plan, workspace, **self._all(asked), fixed=fixed)
        workspace.check()
        return out

    def twin(self, **asked):
        spans = Spans(tuple(self.spans), self.block_size, torch.get_default_device())
        return reference.attention(self.q, self.k, self.v, spans, **self._all(asked))

    def naive(self, **asked):
        spans = tuple(self.spans)
        return attention(self.q, self.k, self.v, spans, self.block_size, **self._all(asked))

    def _all(self, asked):
        """What was asked for, and the rest; sinks go where the step is: cases made them before a GPU was chosen."""
        return {
            name: value.to(self.q.device) if isinstance(value, torch.Tensor) else value
            for name, value in (self.plain | asked).items()
        }


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """A GPU of 8 programs: keys are shared out where a step has fewer tiles than that, or a text is long."""
    monkeypatch.setattr(plans, "FILL", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_any_chunk(chunks, dtype):
    step = Step(CHUNKS[chunks], dtype=dtype)
    got = step.ours()
    assert relative_error(got, step.naive()) <= GATE[dtype]
    assert relative_error(got, step.twin().double()) <= GATE[dtype]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("fixed", [False, True])
def test_any_heads(heads, fixed):
    step = Step([(1, 150), (3, 20)], heads)
    assert relative_error(step.ours(fixed=fixed), step.naive()) <= 1e-5


@pytest.mark.parametrize(
    ("widths", "block_size", "dtype"),
    [
        ((64, 64), 32, torch.bfloat16),
        ((80, 80), 64, torch.float16),
        ((96, 96), 16, torch.float32),
        ((128, 128), 16, torch.bfloat16),
        ((256, 256), 16, torch.bfloat16),
        ((192, 128), 64, torch.bfloat16),
    ],
)
def test_any_width_and_block(widths, block_size, dtype):
    step = Step([(1, 70), (2, 40)], "one for all", dtype, widths, block_size)
    assert relative_error(step.ours(), step.naive()) <= GATE[dtype]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {"window": 1},
        {"window": 150},
        {"softcap": 0.5},
        {"sinks": torch.linspace(-3, 4, 6)},
        {"scale": 2.0},
        {"window": 5, "softcap": 3.0, "sinks": torch.linspace(-3, 4, 6)},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_what_layers_ask_for(asked, fixed):
    step = Step([(1, 300), (4, 20)])
    got, want = step.ours(fixed=fixed, **asked), step.naive(**asked)
    assert relative_error(got, want) <= 1e-5
    assert relative_error(step.naive(), want) > 1e-3, "what was asked for does not show"


@pytest.mark.parametrize("window", [None, 50])
def test_fixed_a_rows_bits_are_its_own(monkeypatch, window):
    """In a chunk of any length, beside any other span, and with its keys shared among any number of programs."""
    step = Step([(1, 3), (12, 1100)], "one for all")  # in float32, where every rounding shows
    together = step.ours(fixed=True, window=window)[1:]
    q, (_, span) = step.q[1:], step.spans
    for first, last, fill, most in [(0, 1, 8, 64), (11, 12, 1, 64), (2, 9, 32, 64), (4, 6, 8, 2)]:
        monkeypatch.setattr(plans, "FILL", fill)
        monkeypatch.setattr(plans, "_MOST_SHARES", most)  # fewer than there are parts
        step.q = q[first:last]
        step.spans = [Span(0, last - first, 1088 + last, span.blocks)]
        assert torch.equal(step.ours(fixed=True, window=window), together[first:last])


@pytest.mark.parametrize("fixed", [False, True])
def test_a_buckets_plan_is_the_same_plan(fixed):
    step, workspace = Step(CHUNKS["decode"]), Workspace(torch.get_default_device())
    bucket = step.ours(workspace, room=40, fixed=fixed)
    assert relative_error(bucket, step.naive()) <= 1e-5
    assert torch.equal(step.ours(workspace, room=40, fixed=fixed), bucket)


@pytest.mark.parametrize("asked", [{}, {"sinks": torch.linspace(-3, 4, 6)}], ids=["plain", "sinks"])
def test_rows_of_no_span_are_zeros(asked):
    step = Step([(3, 3)])
    want = step.ours(**asked)
    step.q = torch.cat([step.q, torch.full_like(step.q, torch.nan)])
    got = step.ours(**asked)
    assert torch.equal(got[3:], torch.zeros_like(got[3:]))
    assert relative_error(got[:3], want.double()) <= 1e-6


def test_queries_may_lie_by_heads():
    step = Step(CHUNKS["mixed"])
    want = step.ours()
    step.q = step.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(step.ours(), want)


def test_a_block_past_two_thousand_million_numbers(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    step = Step([(1, 9)], "one for all", torch.bfloat16, (64, 64))
    want = step.ours()
    block = 2**31 // (16 * 64) + 1
    near, far = step.spans[0].blocks[0] * 16, block * 16
    for name in ("k", "v"):
        cache = torch.empty(far + 16, 1, 64, dtype=torch.bfloat16)  # no memory but for the block written
        cache[far : far + 9] = getattr(step, name)[near : near + 9]
        setattr(step, name, cache)
    step.spans = [Span(0, 1, 9, (block,))]
    assert torch.equal(step.ours(), want)
