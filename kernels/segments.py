"""Which rows of a step read which adapter pages and which KV blocks: plain host data, built once per step.

A segment is a run of consecutive rows with the same adapter set. Page ids are valid in all sites of one group, so a
step has one list of segments per group. A span is the rows of one sequence and the blocks they attend to. Position in
the text (what rotary embeddings read) is another thing and not kept here: a block table may begin with blocks that no
token of the sequence wrote. Knows nothing of adapters' names or of sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start:end` add the pages' deltas, each with its weight (1.0, or a share in a blend)."""

    start: int
    end: int
    pages: tuple[int, ...]
    weights: tuple[float, ...]


def segments_of(rows: list[tuple[int, tuple[int, ...], tuple[float, ...]]]) -> tuple[Segment, ...]:
    """Join neighbours with equal pages and weights into segments.

    `rows` holds (token count, pages, weights) in row order; empty pages (no adapter, or one that does not target
    the group) leave their rows out.
    """
    found: list[Segment] = []
    start = 0
    for count, pages, weights in rows:
        end = start + count
        last = found[-1] if found else None
        if last and last.end == start and (last.pages, last.weights) == (pages, weights):
            found[-1] = Segment(last.start, end, pages, weights)
        elif pages:
            found.append(Segment(start, end, pages, weights))
        start = end
    return tuple(found)


@dataclass(frozen=True, slots=True)
class FlatSegments:
    """Segments as arrays: all pages one after the other, and where each segment's begin; read by every layer."""

    table: NDArray[np.int32]  # [segments, 4]: start, end, first page, pages
    pages: NDArray[np.int32]
    weights: NDArray[np.float32]
    addresses: tuple[int, int, int, int]  # of the table, how many segments, of the pages, of the weights

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> FlatSegments:
        places: list[tuple[int, int, int, int]] = []
        pages: list[int] = []
        weights: list[float] = []
        for segment in segments:
            places.append((segment.start, segment.end, len(pages), len(segment.pages)))
            pages.extend(segment.pages)
            weights.extend(segment.weights)
        table, ids, shares = (
            np.array(places, np.int32),
            np.array(pages, np.int32),
            np.array(weights, np.float32),
        )
        addresses = (table.ctypes.data, len(places), ids.ctypes.data, shares.ctypes.data)
        return cls(table, ids, shares, addresses)


# keys are summed in tiles at fixed multiples of this, whatever the chunk: a row's bits depend on it
KV_TILE = 256


@dataclass(frozen=True, slots=True)
class Span:
    """Query rows `start:end` are the last of `kv_length` positions held by `blocks`."""

    start: int
    end: int
    kv_length: int
    blocks: Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class FlatSpans:
    """Spans as arrays: all blocks one after the other, and where each span's begin; read by every layer."""

    table: NDArray[np.int64]  # [spans, 4]: start, end, kv_length, first block
    blocks: NDArray[np.int32]
    addresses: tuple[int, int, int] = field(init=False)  # of the table, how many spans, of the blocks

    def __post_init__(self) -> None:
        found = (self.table.ctypes.data, len(self.table), self.blocks.ctypes.data)
        object.__setattr__(self, "addresses", found)

    @classmethod
    def of(cls, spans: AnySpans) -> FlatSpans:
        """The spans themselves, where they are arrays already."""
        if isinstance(spans, FlatSpans):
            return spans
        tables = [np.asarray(span.blocks, np.int32) for span in spans]
        first = np.cumsum([0, *map(len, tables)])
        places = [
            (span.start, span.end, span.kv_length, at)
            for span, at in zip(spans, first.tolist(), strict=False)
        ]
        blocks = np.concatenate(tables) if tables else np.zeros(0, np.int32)
        return cls(np.array(places, np.int64).reshape(-1, 4), blocks)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Span:
        start, end, length, first = self.table[index].tolist()
        after = index % len(self.table) + 1
        last = int(self.table[after, 3]) if after < len(self.table) else len(self.blocks)
        return Span(start, end, length, self.blocks[first:last])

    def __iter__(self) -> Iterator[Span]:
        return (self[index] for index in range(len(self.table)))


AnySpans = Sequence[Span] | FlatSpans


@dataclass(slots=True)
class Spans:
    """The spans of one step over a cache of `block_size` positions per block.

    The cache has at least `KV_TILE` finite positions past any block, so that a tile may be read whole.
    """

    spans: AnySpans
    block_size: int
    device: torch.device
    _tiles: dict[tuple[int, int], slice | Tensor] = field(default_factory=dict)
    _flat: FlatSpans | None = None

    @property
    def rows(self) -> int:
        """Rows up to the last of a span; what comes after them only pads the step."""
        return self.spans[-1].end if len(self.spans) else 0

    def flat(self) -> FlatSpans:
        """The spans as arrays, made when first asked for."""
        if self._flat is None:
            self._flat = FlatSpans.of(self.spans)
        return self._flat

    def tile(self, span: int, tile: int) -> slice | Tensor:
        """The `KV_TILE` cache positions of a span's tile: a slice where they lie side by side, else their indices.

        Positions past the span's end are any valid ones: the caller masks them.
        """
        key = (span, tile)
        if key not in self._tiles:
            self._tiles[key] = self._find(self.spans[span], tile)
        return self._tiles[key]

    def _find(self, span: Span, tile: int) -> slice | Tensor:
        per_tile = KV_TILE // self.block_size
        blocks = tuple(map(int, span.blocks[tile * per_tile : (tile + 1) * per_tile]))
        first = blocks[0]
        if all(block == first + i for i, block in enumerate(blocks)):
            return slice(first * self.block_size, first * self.block_size + KV_TILE)
        padded = torch.tensor(blocks + (first,) * (per_tile - len(blocks)))
        index = padded[:, None] * self.block_size + torch.arange(self.block_size)
        return index.flatten().to(self.device)
