"""How big the tiles of an NF4 product are: by the weight's shape, the number of rows and the chip; nothing at run time.

No entry was measured on a GPU. Tile sizes, warps and stages come from the machine code that Triton 3.6 makes of the
kernel for sm_80 and sm_90 (instructions per weight, registers, no spills; docs/kernels.md has the table); splits are
calculated from how evenly the programs share the chip's processors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from kernels.lookup import Lookup

BLOCK = 64  # weights that share an absmax, along k
FIXED_ROWS = 64  # with fixed tiles every product is made as one of so many rows
CROSSOVER_ROWS = 256  # beyond, the weight is dequantized once and multiplied by cuBLAS

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
    splits: int = 1  # of k: each a program of its own, summed in their order by the last to end


# By the rows that a bucket holds at most. The source of each is the machine code, see above.
_TILES: dict[int, dict[int, Tile]] = {
    9: {  # Hopper: wgmma from 64 rows on
        16: Tile(16, 128, 2, 4, 4, "split"),
        32: Tile(32, 128, 1, 4, 4, "split"),
        64: Tile(64, 128, 1, 4, 4, "join"),
    },
    8: {  # Ampere, Ada: mma.sync whatever the rows
        16: Tile(16, 128, 2, 4, 4, "split"),
        32: Tile(32, 128, 1, 4, 4, "split"),
        64: Tile(64, 128, 1, 4, 3, "split"),
    },
}
BUCKETS = tuple(_TILES[9])

# Streaming multiprocessors. Source: NVIDIA's data sheets of A100, A10, L40S, H100 SXM and H200.
_PROCESSORS = {(8, 0): 108, (8, 6): 72, (8, 9): 142, (9, 0): 132}
_MOST_SPLITS = 16
_LEAST_TURNS = 4  # of the loop in a split: fewer than there are stages would only fill the pipeline
_PLENTY = 2  # programs per processor that keep enough bytes in flight, at 24 KB each


def bucket(rows: int) -> int:
    """The bucket whose tiles so many rows use: the smallest that holds them, or the largest."""
    return next((most for most in BUCKETS if rows <= most), BUCKETS[-1])


@cache
def tile_for(out: int, width: int, rows: int, capability: tuple[int, int]) -> Tile:
    """The tile of an `out x width` weight for so many rows on a chip of that compute capability."""
    tile = _TILES[8 if capability[0] < 9 else 9][bucket(rows)]
    blocks = width // BLOCK
    while blocks % tile.blocks:
        tile = replace(tile, blocks=tile.blocks // 2)
    programs = -(-out // tile.columns) * -(-rows // tile.rows)
    turns = blocks // tile.blocks
    return replace(tile, splits=_splits(programs, turns, _PROCESSORS.get(capability, 108)))


def _splits(programs: int, turns: int, processors: int) -> int:
    """The power of two that leaves the fewest processors waiting for the busiest, the smallest on a tie."""
    possible = [1]
    while possible[-1] < _MOST_SPLITS and turns // (2 * possible[-1]) >= _LEAST_TURNS:
        possible.append(2 * possible[-1])

    def waste(splits: int) -> tuple[bool, float]:
        share = programs * splits / processors
        return share < _PLENTY, round(-(-programs * splits // processors) / share, 1)

    return min(possible, key=waste)
