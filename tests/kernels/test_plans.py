"""Segments and spans: the host data that says which rows read what."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.segments import KV_TILE, Span, Spans, segments_of

BLENDS = [((), ()), ((0,), (1.0,)), ((0,), (0.5,)), ((1, 2), (1.0, 1.0)), ((2, 1), (1.0, 1.0))]
ROWS = st.lists(st.tuples(st.integers(1, 5), st.sampled_from(BLENDS)), max_size=12)


@given(ROWS)
def test_every_row_reads_what_it_asked_for(rows):
    segments = segments_of([(count, *blend) for count, blend in rows])
    got = [((), ())] * sum(count for count, _ in rows)
    for segment in segments:
        for row in range(segment.start, segment.end):
            assert got[row] == ((), ()), "a row is in two segments"
            got[row] = (segment.pages, segment.weights)
    assert got == [blend for count, blend in rows for _ in range(count)]


@given(ROWS)
def test_segments_are_in_order_and_as_long_as_can_be(rows):
    segments = segments_of([(count, *blend) for count, blend in rows])
    assert all(segment.start < segment.end for segment in segments)
    assert all(segment.pages for segment in segments)
    for one, other in pairwise(segments):
        assert one.end <= other.start
        same = (one.pages, one.weights) == (other.pages, other.weights)
        assert not (same and one.end == other.start), "neighbours that could be one"


def places(found):
    """The cache positions of a tile, however it was given."""
    return list(range(found.start, found.stop)) if isinstance(found, slice) else found.tolist()


@pytest.mark.parametrize("block_size", [1, 16, 128, KV_TILE])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_tile_holds_the_spans_positions_in_order(block_size, scattered):
    length = KV_TILE + 70
    count = -(-length // block_size)
    blocks = tuple(((torch.randperm(count) if scattered else torch.arange(count)) + 3).tolist())
    spans = Spans((Span(0, 1, length, blocks),), block_size, torch.device("cpu"))
    want = [blocks[p // block_size] * block_size + p % block_size for p in range(length)]
    first, second = places(spans.tile(0, 0)), places(spans.tile(0, 1))
    assert first == want[:KV_TILE]
    assert second[:70] == want[KV_TILE:]
    assert len(second) == KV_TILE
    assert max(first + second) < (max(blocks) + 1) * block_size + KV_TILE, "outside the cache"


def test_blocks_side_by_side_are_a_slice():
    spans = Spans((Span(0, 1, 40, (4, 5, 6)), Span(1, 2, 40, (4, 6, 5))), 16, torch.device("cpu"))
    assert spans.tile(0, 0) == slice(64, 64 + KV_TILE)
    assert isinstance(spans.tile(1, 0), torch.Tensor)


def test_a_tile_is_found_once():
    spans = Spans((Span(0, 1, 40, (6, 4, 5)),), 16, torch.device("cpu"))
    assert spans.tile(0, 0) is spans.tile(0, 0)
