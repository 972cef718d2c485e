"""Where each sequence's queries and keys are in a step: plain host data for paged attention, built once per step.

Position in the text (what rotary embeddings read) is another thing and not kept here: a block table may begin with
blocks that no token of the sequence wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

KV_TILE = 256  # keys are summed in tiles at fixed multiples of this, whatever the chunk: a row's bits depend on it


@dataclass(frozen=True, slots=True)
class Span:
    """Query rows `start:end` are the last of `kv_length` positions held by `blocks`."""

    start: int
    end: int
    kv_length: int
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Spans:
    """The spans of one step over a cache of `block_size` positions per block.

    The cache has at least `KV_TILE` finite positions past any block, so that a tile may be read whole.
    """

    spans: tuple[Span, ...]
    block_size: int
    device: torch.device
    _tiles: dict[tuple[int, int], slice | Tensor] = field(default_factory=dict)

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
        blocks = span.blocks[tile * per_tile : (tile + 1) * per_tile]
        first = blocks[0]
        if all(block == first + i for i, block in enumerate(blocks)):
            return slice(first * self.block_size, first * self.block_size + KV_TILE)
        padded = torch.tensor(blocks + (first,) * (per_tile - len(blocks)))
        index = padded[:, None] * self.block_size + torch.arange(self.block_size)
        return index.flatten().to(self.device)
