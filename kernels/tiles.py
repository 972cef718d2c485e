"""How big the tiles of an NF4 product are: by the weight's shape, the number of rows and the chip; nothing at run time.

Hopper's come from timing 515 of them on an H200 for the four weights of a Llama of 8 billion, and their splits from
timing one to sixteen (`python -m tests.bench.gpu_tiles` times them again). Ampere's and Ada's were measured on no GPU:
they are what Triton 3.6 compiles to few instructions per weight without spills (docs/kernels.md has both).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from kernels.lookup import Lookup

BLOCK = 64  # weights that share an absmax, along k
FIXED_ROWS = 64  # with fixed tiles every product is made as one of so many rows
CROSSOVER_ROWS = 128  # beyond, the weight is dequantized once and multiplied by cuBLAS

Order = Literal["split", "join"]


@dataclass(frozen=True, slots=True)
class Tile:
    """One program sums `rows x columns` of the output over its share of the blocks of k.

    `order` says how bytes meet `x`: "split" takes x's even and odd k apart and multiplies them by high and low nibbles,
    in registers; "join" puts the nibbles in the order of k. Where the left operand must stay in shared memory (wgmma
    reads it from there from 64 rows on: with a left operand in registers ptxas 12.8 can miscompile it, triton #9433),
    only "join" leaves x as it was loaded.
    """

    rows: int
    columns: int
    blocks: int  # of 64 k that one turn of the loop reads
    warps: int
    stages: int
    order: Order
    lookup: Lookup = "shuffle"
    plenty: float = 1.9  # programs for each processor of the chip that keep it loading and computing
    jobs: int = 4  # adapters' pages that one turn of their loop takes, waiting for memory once
    near: int = 1  # rows up to which x is read through the first cache
    splits: int = 1  # of k: each a program of its own, summed in their order by the last to end


# By the rows that a bucket holds at most.
_TILES: dict[int, dict[int, Tile]] = {
    9: {  # Hopper: wgmma from 64 rows on
        16: Tile(16, 64, 2, 2, 4, "split", "mixed", 3.5),
        32: Tile(32, 64, 1, 2, 6, "split", "mixed", 3.5),
        64: Tile(64, 128, 1, 4, 3, "join", "mixed", 1.0),
    },
    8: {  # Ampere, Ada: mma.sync whatever the rows
        16: Tile(16, 128, 2, 4, 4, "split"),
        32: Tile(32, 128, 2, 4, 3, "split"),
        64: Tile(64, 128, 1, 4, 3, "split"),
    },
}
BUCKETS = tuple(_TILES[9])

# Streaming multiprocessors. Source: NVIDIA's data sheets of A100, A10, L40S, H100 SXM and H200.
_PROCESSORS = {(8, 0): 108, (8, 6): 72, (8, 9): 142, (9, 0): 132}
_MOST_SPLITS = 16
_LEAST_TURNS = 2  # of the loop in a split: its loads are then all under way before the first product


def processors(capability: tuple[int, int]) -> int:
    """Of a chip of that compute capability; of the smallest where several have it."""
    return _PROCESSORS.get(capability, 108)


def bucket(rows: int) -> int:
    """The bucket whose tiles so many rows use: the smallest that holds them, or the largest."""
    return next((most for most in BUCKETS if rows <= most), BUCKETS[-1])


@cache
def tile_for(out: int, width: int, rows: int, capability: tuple[int, int]) -> Tile:
    """The tile of an `out x width` weight for so many rows on a chip of that compute capability."""
    tile = _TILES[8 if capability[0] < 9 else 9][bucket(rows)]
    while width // BLOCK % tile.blocks:
        tile = replace(tile, blocks=tile.blocks // 2)
    return replace(tile, splits=_splits(tile, out, width, rows, processors(capability)))


def _splits(tile: Tile, out: int, width: int, rows: int, processors: int) -> int:
    """The fewest, a power of two, that give every processor its programs."""
    turns = width // BLOCK // tile.blocks
    programs = -(-out // tile.columns) * -(-rows // tile.rows)
    most, splits = min(_MOST_SPLITS, turns // _LEAST_TURNS), 1
    while programs * splits < tile.plenty * processors and 2 * splits <= most:
        splits *= 2
    return splits
