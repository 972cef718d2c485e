"""Segments, spans and the plans made of them: the host data that says which rows read what."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import plans
from kernels.plans import AttentionPlan, DeltaPlan, Heads
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


def delta_plan(rows, segments, *, fixed):
    """The plan's tiles, its jobs and the jobs of each granule, read from no more of the buffer than is in use."""
    most = max((len(segment.pages) for segment in segments), default=1)
    out = np.full(DeltaPlan.sizes(rows, most), -1, np.int32)
    used = DeltaPlan.fill(out, segments, rows, fixed=fixed)
    assert (out[used:] == -1).all(), "written past what is in use"
    granules = -(-rows // plans.GRANULE)
    bounds = out[plans.DELTA_HEAD : plans.DELTA_HEAD + 2 * granules].reshape(2, granules)
    records = out[plans.DELTA_HEAD + 2 * granules : used].reshape(-1, plans.DELTA_RECORD)
    assert out[0] == len(records)
    jobs = records[: sum(len(segment.pages) for segment in segments), 5:]
    return records[:, :5], jobs, bounds.T


@given(ROWS, st.integers(0, 40), st.booleans())
def test_every_row_is_in_one_tile_per_page_and_every_job_is_found(rows, padding, fixed):
    segments = segments_of([(count * 7, *blend) for count, blend in rows])
    count = max(1, sum(count * 7 for count, _ in rows) + padding)
    tiles, jobs, bounds = delta_plan(count, segments, fixed=fixed)
    want = sorted(
        (row, page, place, weight)
        for segment in segments
        for row in range(segment.start, segment.end)
        for place, (page, weight) in enumerate(zip(segment.pages, segment.weights, strict=True))
    )
    got = [
        (row, page, place, float(np.int32(weight).view(np.float32)))
        for page, first, end, place, weight in tiles.tolist()
        for row in range(first, end)
    ]
    assert sorted(got) == want
    height = 16 if fixed or count <= plans.FEW_ROWS else 64
    assert all(0 < end - first <= height for _, first, end, _, _ in tiles.tolist())
    assert sorted(tiles[:, 0]) == list(tiles[:, 0]), "tiles of a page lie apart"
    spread = [(row, page, place) for page, start, end, place in jobs.tolist() for row in range(start, end)]
    assert sorted(spread) == [(row, page, place) for row, page, place, _ in want]
    for granule, (first, end) in enumerate(bounds.tolist()):
        reached = [
            job
            for job, (_, start, stop, _) in enumerate(jobs.tolist())
            if start < (granule + 1) * 16 and stop > granule * 16
        ]
        assert reached == list(range(first, end))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3000)), max_size=6),
    st.integers(0, 9),
    st.integers(1, 8),
    st.integers(0, 40),
    st.booleans(),
)
def test_every_query_is_in_one_tile(chunks, padding, queries, enough, fixed):
    """Tiles hold the rows of one span; the padding's see no key; shares lie side by side; lines are numbered apart."""
    spans, start, block = [], 0, 0
    for count, before in chunks:
        held = -(-(before + count) // 16)
        spans.append(Span(start, start + count, before + count, range(block, block + held)))
        start, block = start + count, block + held
    rows = max(1, start + padding)
    out = np.full(AttentionPlan.sizes(rows, block + 3, enough), -1, np.int32)
    used, size = AttentionPlan.fill(out, spans, rows, queries, enough, fixed=fixed)
    assert (out[used:] == -1).all(), "written past what is in use"
    records_end = plans.ATTENTION_HEAD + size.records * plans.ATTENTION_RECORD
    records = out[plans.ATTENTION_HEAD : records_end].reshape(size.records, -1).tolist()
    blocks = out[plans.ATTENTION_HEAD + (rows + enough) * plans.ATTENTION_RECORD : used]
    assert out[0] == size.records
    assert len({tuple(record[:2]) for record in records}) == size.tiles
    next_row = next_line = at = 0
    while at < len(records):
        row, end, before, line, first_block, _, shares = records[at]
        same = [row, end, before, line, first_block]
        assert records[at : at + shares] == [[*same, share, shares] for share in range(shares)]
        assert (row, line) == (next_row, next_line)
        assert row < end <= row + queries
        parts = -(-(before + end - row) // plans.PART_KEYS) if fixed else shares
        at, next_row, next_line = at + shares, end, line + (parts * (end - row) if shares > 1 else 0)
        span = next((span for span in spans if span.start <= row < span.end), None)
        if span is None:
            assert before + end - row == 0
            continue
        assert end <= span.end
        assert before == span.kv_length - span.end + row
        assert blocks[first_block : first_block + len(span.blocks)].tolist() == list(span.blocks)
    assert (next_row, next_line) == (rows, size.lines)


def shares_of(lengths, enough):
    """Of decodes at the end of texts of so many keys."""
    spans = [Span(row, row + 1, keys, (0,)) for row, keys in enumerate(lengths)]
    out = np.zeros(AttentionPlan.sizes(len(lengths), len(lengths), enough), np.int32)
    _, size = AttentionPlan.fill(out, spans, len(lengths), 1, enough)
    end = plans.ATTENTION_HEAD + size.records * plans.ATTENTION_RECORD
    records = out[plans.ATTENTION_HEAD : end].reshape(-1, plans.ATTENTION_RECORD)
    return [int(records[records[:, 0] == row][0, 6]) for row in range(len(lengths))]


def test_a_long_text_does_not_keep_a_step_waiting():
    """No program has twice what it would have if all had as much, or 128 keys; what is as long as others is whole."""
    assert shares_of([1024] * 32, 32) == [1] * 32
    assert shares_of([1024] * 16, 32) == [2] * 16
    assert shares_of([1024], 32) == [8]
    assert shares_of([100_000], 32) == [32]
    assert shares_of([100_000, *[1000] * 31], 32) == [25, *[1] * 31]
    assert shares_of([5000, *[1000] * 255], 32) == [1] * 256
    assert shares_of([100_000], 256) == [64], "more are not put together by one program"
    assert shares_of([100_000, 5], 0) == [1, 1], "a plan that shares nothing"


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=40), st.integers(1, 64))
def test_no_program_has_more_than_twice_its_part(lengths, enough):
    fair = max(plans.LEAST_SHARE, sum(lengths) / enough)
    for keys, shares in zip(lengths, shares_of(lengths, enough), strict=True):
        assert keys / shares < 2 * (fair + plans.LEAST_SHARE)


def test_heads_that_fill_a_device():
    assert Heads(4, 8).enough == 32
    assert Heads(1, 40).enough == 6
    assert Heads(40, 1).enough == 128, "two tiles for one key head"
    assert Heads(1, 500).enough == 1
    assert (Heads(4, 8).queries(1), Heads(4, 8).queries(2), Heads(4, 8).queries(1, fixed=True)) == (1, 8, 8)
    assert Heads(40, 1).queries(9) == 1
