"""A step's work for the GPU kernels as one int32 buffer: which tile reads what, built once per step for all layers.

A buffer's size and the places in it depend on the bucket alone (how many rows, how many pages or blocks at most), so a
captured graph reads the same addresses in every replay. `fill` says how much of it is in use: no more needs to be
copied to the device. Host data only: knows nothing of Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.segments import AnySpans, FlatSegments, FlatSpans, Segment, Span

PAGE_RANK = 16  # rank rows of a page
GRANULE = 16  # rows between two entries of the list that finds the jobs of a tile of rows
FEW_ROWS = 256  # up to here tiles are low: bytes bound a step, and most segments are short

_Ints = NDArray[np.int32]

DELTA_HEAD = 1  # tiles in use
_TILE, _JOB = 5, 4  # int32 of a tile (page, row, end, place, weight) and of a job (page, start, end, place)
DELTA_RECORD = _TILE + _JOB


@dataclass(frozen=True, slots=True)
class DeltaPlan:
    """Tiles for shrink and jobs for expand.

    A tile is one page and up to `tile_rows` rows of a segment that holds it as its page number `place`: columns
    `place * 16` and on of v. Tiles of one page lie side by side, so that it comes from memory once, whoever shares
    it. A job is one page of a segment and all of its rows; jobs are in row order, and for each granule of 16 rows the
    buffer says which are its own. A row without an adapter is in no tile and in no job.

    `[head | first job of each granule | end of its jobs | records of one tile and one job each]`
    """

    buffer: Tensor  # [size] int32
    rows: int
    most_pages: int  # of one segment
    tiles: int  # that a launch makes room for
    tile_rows: int

    @staticmethod
    def sizes(rows: int, most_pages: int) -> int:
        """How many int32 a bucket needs."""
        return _records_at(rows) + rows * most_pages * DELTA_RECORD

    @staticmethod
    def fill(out: _Ints, segments: Sequence[Segment], rows: int, *, fixed: bool = False) -> int:
        """Write the plan; returns how many int32 from the first on are in use."""
        out[0] = 0
        granules = -(-rows // GRANULE)
        bounds = out[DELTA_HEAD : _records_at(rows)].reshape(2, granules)
        bounds[:] = 0
        if not segments:
            return _records_at(rows)
        jobs, weights = _jobs(segments)
        at = np.arange(granules, dtype=np.int32) * GRANULE
        bounds[0] = np.searchsorted(jobs[:, 2], at, side="right")
        bounds[1] = np.searchsorted(jobs[:, 1], at + GRANULE, side="left")
        tiles = _tiles(jobs, weights, _tile_rows(rows, fixed))
        used = _records_at(rows) + len(tiles) * DELTA_RECORD
        records = out[_records_at(rows) : used].reshape(-1, DELTA_RECORD)
        records[:, :_TILE] = tiles
        records[: len(jobs), _TILE:] = jobs
        out[0] = len(tiles)
        return used

    @classmethod
    def view(
        cls,
        buffer: Tensor,  # [sizes(rows, most_pages)] int32
        rows: int,
        most_pages: int,
        *,
        used: int | None = None,
        fixed: bool = False,
    ) -> DeltaPlan:
        """The plan in a device buffer; `used`, as `fill` gave it, keeps launches outside graphs small."""
        assert buffer.numel() >= cls.sizes(rows, most_pages)
        tiles = rows * most_pages if used is None else (used - _records_at(rows)) // DELTA_RECORD
        return cls(buffer, rows, most_pages, tiles, _tile_rows(rows, fixed))

    @property
    def hidden(self) -> int:
        """Columns of v for each member."""
        return self.most_pages * PAGE_RANK


def _records_at(rows: int) -> int:
    return DELTA_HEAD + 2 * -(-rows // GRANULE)


def _tile_rows(rows: int, fixed: bool) -> int:
    """Rows of a tile: high ones read a page less often, and are summed by other instructions than low ones."""
    return 16 if fixed or rows <= FEW_ROWS else 64


def _jobs(segments: Sequence[Segment]) -> tuple[_Ints, _Ints]:  # [jobs, 4], the bits of their weights
    flat = FlatSegments.of(segments)
    start, end, first, count = flat.table.T
    assert np.all(end[:-1] <= start[1:]), "segments out of order"
    job = np.repeat(np.arange(len(flat.table)), count)
    place = np.arange(len(flat.pages), dtype=np.int32) - first[job]
    return np.stack((flat.pages, start[job], end[job], place), axis=1), flat.weights.view(np.int32)


def _tiles(jobs: _Ints, weights: _Ints, height: int) -> _Ints:  # [tiles, 5]
    order = np.argsort(jobs[:, 0], kind="stable")
    page, start, end, place = jobs[order].T
    each = -(-(end - start) // height)
    job = np.repeat(np.arange(len(jobs)), each)
    row = start[job] + (np.arange(len(job)) - np.repeat(np.cumsum(each) - each, each)) * height
    ends = np.minimum(row + height, end[job])
    return np.stack((page[job], row, ends, place[job], weights[order][job]), axis=1).astype(np.int32)


ATTENTION_HEAD = 1  # records in use
# of a tile's share: first row, end, keys before its first row, first line, first block, which of how many shares
ATTENTION_RECORD = 7
PART_KEYS = 256  # where parts are at fixed places, they are this long
TILE_HEIGHT = 32  # rows of a tile at most: one for each of its queries and of the heads that share a key head
FILL = 256  # programs that keep a large GPU busy
LEAST_SHARE = 128  # keys that are worth a program
_MOST_SHARES = 64  # of a tile, which one program puts together


@dataclass(frozen=True, slots=True)
class Heads:
    """What a model's attention is made of; of layers that differ, the widest group and the fewest key heads."""

    group: int  # query heads that share a key head
    kv: int  # key heads

    def queries(self, longest: int, *, fixed: bool = False) -> int:
        """Of a tile, at most, where no span has more than `longest` rows."""
        return 1 if longest == 1 and not fixed else max(1, TILE_HEIGHT // self.group)

    @property
    def enough(self) -> int:
        """Tiles that keep a large GPU busy."""
        return max(1, FILL // (self.kv * -(-self.group // TILE_HEIGHT)))


@dataclass(frozen=True, slots=True)
class AttentionSize:
    """How much of a plan a step takes, or at most any step of a bucket."""

    tiles: int
    records: int  # shares of tiles
    lines: int  # of all shared tiles together


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Tiles of queries of one span each, and the spans' blocks one after the other.

    Most tiles are one program's for each key head. Where that would leave the device idle, or waiting for one long
    text, a tile has several shares, each with a record, side by side. The rows that pad a bucket are tiles that see no
    key. A shared tile has a line for each part of its keys and query, from `first line` on: a part is a share's, or at
    a fixed place.

    `[head | a record per share | blocks]`
    """

    buffer: Tensor  # [size] int32
    rows: int
    room: int  # for records
    records: int  # that a launch makes room for
    shared: bool  # whether a tile may have several
    lines: int  # of all shared tiles together
    queries: int  # of a tile, at most
    block_size: int  # positions of a block

    @staticmethod
    def sizes(rows: int, most_blocks: int, enough: int) -> int:
        """How many int32 a bucket needs; `most_blocks` of all its spans together."""
        return _blocks_at(rows, enough) + most_blocks

    @staticmethod
    def most(tiles: int, queries: int, enough: int) -> AttentionSize:
        """Of a bucket of so many tiles, where parts are the shares'.

        A share has a length that is everyone's, and `enough` of them hold all keys. A tile that is shared has two full
        ones at least: so all shared tiles have `1.5 * enough` at most, and all tiles `enough` more than they are.
        """
        return AttentionSize(tiles, tiles + enough, 3 * enough // 2 * queries)

    @staticmethod
    def most_fixed(tiles: int, enough: int, most_blocks: int, block_size: int) -> AttentionSize:
        """Of a bucket of decodes, whose spans have a row each, where parts are at fixed places."""
        return AttentionSize(tiles, tiles + enough, tiles + most_blocks * block_size // PART_KEYS)

    @staticmethod
    def fill(
        out: _Ints, spans: AnySpans, rows: int, queries: int, enough: int, *, fixed: bool = False
    ) -> tuple[int, AttentionSize]:
        """Write the plan for tiles of `queries` rows; how many int32 are in use, and how much of it.

        `enough` tiles keep the device busy; 0: no tile is shared.
        """
        flat = FlatSpans.of(spans)
        tiles, blocks = _cut(_padded(flat.table, rows), queries), flat.blocks
        start, end, keys, first_block = tiles.T
        shares = _shares(keys, enough)
        parts = -(-keys // PART_KEYS) if fixed else shares
        lines = np.where(shares > 1, parts * (end - start), 0)
        records_end, lines_end = np.cumsum(shares), np.cumsum(lines)  # of each tile
        size = AttentionSize(len(tiles), int(records_end[-1]), int(lines_end[-1]))
        used = ATTENTION_HEAD + ATTENTION_RECORD * size.records
        records = out[ATTENTION_HEAD:used].reshape(size.records, ATTENTION_RECORD)
        before_first = shares - records_end
        of_tile = (start, end, keys - (end - start), lines_end - lines, first_block, before_first, shares)
        for place, column in enumerate(of_tile):
            records[:, place] = column if size.records == size.tiles else np.repeat(column, shares)
        records[:, 5] += np.arange(size.records)
        out[0] = size.records
        blocks_at = _blocks_at(rows, enough)
        out[blocks_at : blocks_at + len(blocks)] = blocks
        return blocks_at + len(blocks), size

    @classmethod
    def of(
        cls,
        spans: Sequence[Span],
        rows: int,
        longest: int,
        heads: Heads,
        block_size: int,
        device: torch.device,
    ) -> AttentionPlan:
        """Of spans of `longest` rows at most, on a device and just as large as they need."""
        queries, enough = heads.queries(longest), heads.enough
        out = np.zeros(cls.sizes(rows, sum(len(span.blocks) for span in spans), enough), np.int32)
        _, size = cls.fill(out, spans, rows, queries, enough)
        return cls.view(torch.from_numpy(out).to(device), rows, queries, enough, block_size, size)

    @classmethod
    def view(
        cls,
        buffer: Tensor,  # [sizes(rows, most_blocks, enough)] int32
        rows: int,
        queries: int,
        enough: int,
        block_size: int,
        size: AttentionSize,
    ) -> AttentionPlan:
        """The plan in a device buffer; the size as `fill` gave it, or the bucket's most in a graph."""
        assert len(buffer) >= _blocks_at(rows, enough)
        shared = size.records > size.tiles
        return cls(buffer, rows, rows + enough, size.records, shared, size.lines, queries, block_size)


def _blocks_at(rows: int, enough: int) -> int:
    return ATTENTION_HEAD + (rows + enough) * ATTENTION_RECORD


def _shares(keys: NDArray[np.int64], enough: int) -> NDArray[np.int64]:  # [tiles]
    """Programs for each tile's keys: one, if it has less than twice what `enough` programs for all would have each."""
    if not enough:
        return np.ones_like(keys)
    each = max(1, -(-int(keys.sum()) // (enough * LEAST_SHARE))) * LEAST_SHARE
    return np.where(keys < 2 * each, 1, np.minimum(-(-keys // each), _MOST_SHARES))


def _padded(spans: NDArray[np.int64], rows: int) -> NDArray[np.int64]:  # [spans, 4]
    """Up to the last row: those that pad a bucket are a span of no keys."""
    end = int(spans[-1, 1]) if len(spans) else 0
    return spans if end == rows else np.concatenate((spans, [[end, rows, 0, 0]]))


def _cut(spans: NDArray[np.int64], queries: int) -> NDArray[np.int64]:  # [tiles, 4]
    """Spans of `queries` rows at most: each sees the keys up to its own last row."""
    start, end, keys, first_block = spans.T
    each = -(-(end - start) // queries)
    if each.max() == 1:
        return spans
    span = np.repeat(np.arange(len(spans)), each)
    row = start[span] + (np.arange(len(span)) - np.repeat(np.cumsum(each) - each, each)) * queries
    last = np.minimum(row + queries, end[span])
    seen = np.where(keys[span] > 0, keys[span] - end[span] + last, 0)
    return np.stack((row, last, seen, first_block[span]), axis=1)
