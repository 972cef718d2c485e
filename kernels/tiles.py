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
        32: Tile(32, 128, 2, 4, 3, "split"),
        64: Tile(64, 128, 1, 4, 4, "join"),
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
_PLENTY = 1.9  # programs per processor that keep enough bytes in flight: 23 KB for 4.3 TB/s at 700 ns
_WEIGHT_BYTES = 0.5625  # a code and its share of an absmax
_ROW_BYTES = 0.0215  # what memory gives while a row meets a weight: 4.3 TB/s, 400 TFLOP/s
_SUM_BYTES = 4  # a float32 written and read, by an L2 twice as fast as memory


def bucket(rows: int) -> int:
    """The bucket whose tiles so many rows use: the smallest that holds them, or the largest."""
    return next((most for most in BUCKETS if rows <= most), BUCKETS[-1])


@cache
def tile_for(out: int, width: int, rows: int, capability: tuple[int, int]) -> Tile:
    """The tile of an `out x width` weight for so many rows on a chip of that compute capability."""
    tile = _TILES[8 if capability[0] < 9 else 9][bucket(rows)]
    while width // BLOCK % tile.blocks:
        tile = replace(tile, blocks=tile.blocks // 2)
    return replace(tile, splits=_splits(tile, out, width, rows, _PROCESSORS.get(capability, 108)))


def _splits(tile: Tile, out: int, width: int, rows: int, processors: int) -> int:
    """The power of two that keeps every processor loading, then that which costs least.

    The cost is the busiest processor's share against the mean, times what the split sums add to the work.
    """
    turns = width // BLOCK // tile.blocks
    possible = [1]
    while possible[-1] < _MOST_SPLITS and turns // (2 * possible[-1]) >= _LEAST_TURNS:
        possible.append(2 * possible[-1])
    tall = -(-rows // tile.rows)
    work = width * max(_WEIGHT_BYTES, _ROW_BYTES * tall * tile.rows)  # of a column

    def cost(splits: int) -> tuple[float, float]:
        programs = -(-out // tile.columns) * tall * splits
        uneven = -(-programs // processors) / (programs / processors)
        sums = _SUM_BYTES * splits * tall * tile.rows if splits > 1 else 0
        return max(0.0, _PLENTY - programs / processors), uneven * (1 + sums / work)

    return min(possible, key=cost)
