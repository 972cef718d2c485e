"""Paged attention against a masked softmax, row by row and head by head, in float64."""

import pytest
import torch

from kernels import reference
from kernels.segments import KV_TILE, Span, Spans
from tests.kernels.naive import attention, relative_error

WIDTHS = (8, 12)  # of keys, of values
HEADS = {"one to one": (2, 2), "grouped": (6, 2), "one for all": (4, 1)}
# (queries, keys) of the spans of a step: decodes, whole prompts, chunks in the middle and around a tile's edge
CHUNKS = {
    "decode": [(1, 1), (1, 37), (1, KV_TILE), (1, KV_TILE + 1)],
    "prompt": [(1, 1), (16, 16), (33, 33)],
    "chunk": [(7, 300), (20, 530)],
    "edge": [(5, KV_TILE + 2), (3, 2 * KV_TILE)],
    "mixed": [(1, 290), (19, 40), (1, 5)],
}
GATE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Step:
    """Spans over a cache that is NaN wherever no span keeps anything."""

    def __init__(self, chunks, heads="grouped", dtype=torch.float32, block_size=16, scattered=True):
        query_heads, self.kv_heads = HEADS[heads]
        needed = [-(-keys // block_size) for _, keys in chunks]
        blocks = (torch.randperm(sum(needed)) if scattered else torch.arange(sum(needed))) + 1
        self.spans, start = [], 0
        for (queries, keys), ids in zip(chunks, blocks.split(needed), strict=True):
            self.spans.append(Span(start, start + queries, keys, tuple(ids.tolist())))
            start += queries
        self.block_size = block_size
        positions = (sum(needed) + 1) * block_size + KV_TILE
        self.k = torch.full((positions, self.kv_heads, WIDTHS[0]), torch.nan, dtype=dtype)
        self.v = torch.full((positions, self.kv_heads, WIDTHS[1]), torch.nan, dtype=dtype)
        for span in self.spans:
            for at in range(span.kv_length):
                place = span.blocks[at // block_size] * block_size + at % block_size
                self.k[place] = torch.randn_like(self.k[place])
                self.v[place] = torch.randn_like(self.v[place])
        self.q = torch.randn(start, query_heads, WIDTHS[0]).to(dtype)

    def ours(self, **asked):
        spans = Spans(tuple(self.spans), self.block_size, torch.device("cpu"))
        return reference.attention(self.q, self.k, self.v, spans, **(PLAIN | asked))

    def naive(self, **asked):
        return attention(self.q, self.k, self.v, tuple(self.spans), self.block_size, **(PLAIN | asked))


PLAIN = {"scale": WIDTHS[0] ** -0.5, "window": None, "softcap": None, "sinks": None}


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_any_chunk_of_any_heads(dtype, heads, chunks):
    step = Step(CHUNKS[chunks], heads, dtype)
    assert relative_error(step.ours(), step.naive()) <= GATE[dtype]


@pytest.mark.parametrize("window", [1, 5, KV_TILE, 300])
@pytest.mark.parametrize("chunks", ["prompt", "chunk", "edge"])
def test_a_window(window, chunks):
    step = Step(CHUNKS[chunks])
    assert relative_error(step.ours(window=window), step.naive(window=window)) <= 1e-5


def test_a_window_of_one_sees_itself_alone():
    step = Step([(4, 40)], "one to one")
    places = [step.spans[0].blocks[at // 16] * 16 + at % 16 for at in range(36, 40)]
    assert torch.allclose(step.ours(window=1), step.v[places])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_a_softcap(window, softcap):
    step = Step(CHUNKS["mixed"])
    asked = {"window": window, "softcap": softcap}
    assert relative_error(step.ours(**asked), step.naive(**asked)) <= 1e-5
    assert relative_error(step.ours(window=window), step.naive(**asked)) > 1e-4


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 20])
def test_sinks(heads, window):
    step = Step(CHUNKS["mixed"], heads)
    asked = {"window": window, "sinks": torch.linspace(-3, 4, step.q.shape[1])}
    assert relative_error(step.ours(**asked), step.naive(**asked)) <= 1e-5
    assert relative_error(step.ours(window=window), step.naive(**asked)) > 1e-2


def test_the_scale_is_the_callers():
    step = Step(CHUNKS["mixed"])
    assert relative_error(step.ours(scale=2.0), step.naive(scale=2.0)) <= 1e-5
    assert relative_error(step.ours(), step.naive(scale=2.0)) > 1e-2


@pytest.mark.parametrize("block_size", [1, 16, 64, KV_TILE])
def test_where_blocks_lie_does_not_show(block_size):
    """Contiguous blocks are read in place, scattered ones gathered: the same bits."""
    chunks = [(9, 300), (1, 70)]
    contiguous = Step(chunks, block_size=block_size, scattered=False)
    scattered = Step(chunks, block_size=block_size)
    scattered.q = contiguous.q
    for here, there in zip(contiguous.spans, scattered.spans, strict=True):
        for one, other in zip(here.blocks, there.blocks, strict=True):
            to, of = (slice(b * block_size, (b + 1) * block_size) for b in (other, one))
            scattered.k[to], scattered.v[to] = contiguous.k[of], contiguous.v[of]
    assert relative_error(contiguous.ours(), contiguous.naive()) <= 1e-5
    assert torch.equal(scattered.ours(), contiguous.ours())


@pytest.mark.parametrize("window", [None, 50])
def test_a_rows_bits_are_its_own(window):
    """In a chunk of any length and beside any other span: the same bits."""
    step = Step([(40, 290), (3, 3)])
    together = step.ours(window=window)
    q, (span, _) = step.q, step.spans
    for first, last in [(0, 1), (39, 40), (3, 20), (0, 40)]:
        step.q = q[first:last]
        step.spans = [Span(0, last - first, 250 + last, span.blocks)]
        assert torch.equal(step.ours(window=window), together[first:last])


def test_rows_of_no_span_are_zeros():
    step = Step([(3, 3)])
    step.q = torch.cat([step.q, torch.full_like(step.q, torch.nan)])
    assert torch.equal(step.ours()[3:], torch.zeros(3, 6, WIDTHS[1]))


def test_write_kv_writes_its_rows_alone():
    cache = torch.full((20, 2, 4), 7.0)
    rows = torch.randn(3, 2, 4)
    reference.write_kv(cache, rows, torch.tensor([19, 0, 5]))
    assert torch.equal(cache[[19, 0, 5]], rows)
    assert cache[1:5].eq(7).all()
    assert cache[6:19].eq(7).all()


def test_write_kv_rounds_to_the_caches_dtype():
    cache = torch.zeros(4, 1, 1, dtype=torch.bfloat16)
    reference.write_kv(cache, torch.full((1, 1, 1), 1.001), torch.tensor([2]))
    assert cache.flatten().tolist() == [0, 0, 1, 0]
