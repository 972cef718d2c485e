"""Paged attention against a masked softmax, row by row and head by head, in float64."""

import pytest
import torch

from kernels import reference
from kernels.cpu import operations
from kernels.segments import KV_TILE, Span, Spans
from tests.kernels.naive import attention, relative_error

WIDTHS = (8, 12)  # of keys, of values
HEADS = {"one to one": (2, 2), "grouped": (6, 2), "one for all": (4, 1), "many": (18, 9)}
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

    def ours(self, kernels, **asked):
        spans = Spans(tuple(self.spans), self.block_size, torch.device("cpu"))
        if kernels is not None:
            return operations.attention(kernels, self.q.float(), self.k, self.v, spans, **(PLAIN | asked))
        return reference.attention(self.q, self.k, self.v, spans, **(PLAIN | asked))

    def naive(self, **asked):
        return attention(self.q, self.k, self.v, tuple(self.spans), self.block_size, **(PLAIN | asked))


PLAIN = {"scale": WIDTHS[0] ** -0.5, "window": None, "softcap": None, "sinks": None}


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_any_chunk_of_any_heads(kernels, dtype, heads, chunks):
    step = Step(CHUNKS[chunks], heads, dtype)
    assert relative_error(step.ours(kernels), step.naive()) <= GATE[dtype]


@pytest.mark.parametrize("window", [1, 5, KV_TILE, 300])
@pytest.mark.parametrize("chunks", ["prompt", "chunk", "edge"])
def test_a_window(kernels, window, chunks):
    step = Step(CHUNKS[chunks])
    assert relative_error(step.ours(kernels, window=window), step.naive(window=window)) <= 1e-5


def test_a_window_of_one_sees_itself_alone(kernels):
    step = Step([(4, 40)], "one to one")
    places = [step.spans[0].blocks[at // 16] * 16 + at % 16 for at in range(36, 40)]
    assert torch.allclose(step.ours(kernels, window=1), step.v[places])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_a_softcap(kernels, window, softcap):
    step = Step(CHUNKS["mixed"])
    asked = {"window": window, "softcap": softcap}
    assert relative_error(step.ours(kernels, **asked), step.naive(**asked)) <= 1e-5
    assert relative_error(step.ours(kernels, window=window), step.naive(**asked)) > 1e-4


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 20])
def test_sinks(kernels, heads, window):
    step = Step(CHUNKS["mixed"], heads)
    asked = {"window": window, "sinks": torch.linspace(-3, 4, step.q.shape[1])}
    assert relative_error(step.ours(kernels, **asked), step.naive(**asked)) <= 1e-5
    assert relative_error(step.ours(kernels, window=window), step.naive(**asked)) > 1e-2


def test_the_scale_is_the_callers(kernels):
    step = Step(CHUNKS["mixed"])
    assert relative_error(step.ours(kernels, scale=2.0), step.naive(scale=2.0)) <= 1e-5
    assert relative_error(step.ours(kernels), step.naive(scale=2.0)) > 1e-2


@pytest.mark.parametrize("block_size", [1, 16, 64, KV_TILE])
def test_where_blocks_lie_does_not_show(kernels, block_size):
    """Contiguous blocks are read in place, scattered ones gathered: the same bits."""
    chunks = [(9, 300), (1, 70)]
    contiguous = Step(chunks, block_size=block_size, scattered=False)
    scattered = Step(chunks, block_size=block_size)
    scattered.q = contiguous.q
    for here, there in zip(contiguous.spans, scattered.spans, strict=True):
        for one, other in zip(here.blocks, there.blocks, strict=True):
            to, of = (slice(b * block_size, (b + 1) * block_size) for b in (other, one))
            scattered.k[to], scattered.v[to] = contiguous.k[of], contiguous.v[of]
    assert relative_error(contiguous.ours(kernels), contiguous.naive()) <= 1e-5
    assert torch.equal(scattered.ours(kernels), contiguous.ours(kernels))


@pytest.mark.parametrize("heads", ["one to one", "grouped"])
@pytest.mark.parametrize("window", [None, 50])
def test_a_rows_bits_are_its_own(kernels, window, heads):
    """In a chunk of any length and beside any other span: the same bits."""
    step = Step([(40, 290), (3, 3)], heads)
    together = step.ours(kernels, window=window)
    q, (span, _) = step.q, step.spans
    for first, last in [(0, 1), (39, 40), (1, 3), (4, 7), (5, 9), (0, 5), (3, 20), (0, 40)]:
        step.q = q[first:last]
        step.spans = [Span(0, last - first, 250 + last, span.blocks)]
        assert torch.equal(step.ours(kernels, window=window), together[first:last])


def test_spans_shared_among_threads_are_the_same_spans(kernels, threads):
    """Enough keys to be shared: whoever attends, a row's bits are the same."""
    step = Step([(1, 600), (9, 200), (1, 1)] * 3, "one to one")
    got = step.ours(kernels)
    assert relative_error(got, step.naive()) <= 1e-5
    torch.set_num_threads(3 - threads)
    other = step.ours(kernels)
    torch.set_num_threads(threads)
    assert torch.equal(step.ours(kernels), other)
    assert torch.equal(got, other)


def test_queries_may_lie_by_heads(kernels):
    step = Step(CHUNKS["mixed"])
    want = step.ours(kernels)
    step.q = step.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(step.ours(kernels), want)


def test_rows_of_no_span_are_zeros(kernels):
    step = Step([(3, 3)])
    step.q = torch.cat([step.q, torch.full_like(step.q, torch.nan)])
    assert torch.equal(step.ours(kernels)[3:], torch.zeros(3, 6, WIDTHS[1]))


def write(kernels, cache, rows, index):
    """The rows as keys into one cache and, upside down, as values into another; both caches back."""
    other = cache.clone()
    if kernels is None:
        reference.write_kv(cache, rows, index)
        reference.write_kv(other, rows.flip(0), index)
    else:
        operations.write_kv(kernels, cache, other, rows, rows.flip(0), index, len(rows))
    return cache, other


@pytest.mark.parametrize("dtype", GATE)
def test_write_kv_writes_its_rows_alone(kernels, dtype):
    rows = torch.randn(2, 3, 4).transpose(0, 1)  # as a model gives them: [heads, rows, width] in memory
    keys, values = write(kernels, torch.full((20, 2, 4), 7.0, dtype=dtype), rows, torch.tensor([19, 0, 5]))
    assert torch.equal(keys[[19, 0, 5]], rows.to(dtype))
    assert torch.equal(values[[19, 0, 5]], rows.flip(0).to(dtype))
    for cache in (keys, values):
        assert cache[1:5].eq(7).all()
        assert cache[6:19].eq(7).all()


def test_write_kv_rounds_as_torch_does(kernels):
    numbers = torch.cat([torch.randn(500), torch.tensor([1.001, -0.0, torch.inf, 1e-40, 3.4e38, 1.00390625])])
    rows = numbers.view(-1, 1, 2)
    keys, _ = write(
        kernels, torch.zeros(len(rows), 1, 2, dtype=torch.bfloat16), rows, torch.arange(len(rows))
    )
    assert torch.equal(keys, rows.bfloat16())
    nothing, _ = write(
        kernels, torch.zeros(1, 1, 2).bfloat16(), torch.full((1, 1, 2), torch.nan), torch.tensor([0])
    )
    assert nothing.isnan().all()
