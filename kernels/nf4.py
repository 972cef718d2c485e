"""Products with NF4 weights on a GPU, straight from the bytes of bitsandbytes, and the adapters' deltas with them.

`x` is the left operand always, as it lies in memory; weights are decoded on their way to the tensor cores, and absmax
is applied to the sums of a block. Knows nothing of models, of adapters' names or of how pages are found.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.lookup import CONSTRAINTS, Half, assembly
from kernels.lora import CHUNK, GRANULE, STEP, Deltas, add_jobs, shrink, shrink_tiles
from kernels.nf4_decode import NF4Weight, dequantize_into
from kernels.portable import dot, early, look_up, narrow, wait_for_earlier
from kernels.tiles import BUCKETS, CROSSOVER_ROWS, FIXED_ROWS, Tile, processors, tile_for
from kernels.workspace import Workspace

_MOST_COUNTED = 1 << 15  # of two numbers in one counter
SHRINK_STAGES = tl.constexpr(4)  # of shrink's loop here, whose loads fit where those of weights do

_HALVES: dict[torch.dtype, Half] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def folds(rows: int, *, fixed: bool) -> bool:
    """Whether `linear` takes deltas at so many rows; beyond, `kernels.lora.add_deltas` adds them afterwards."""
    return fixed or rows <= CROSSOVER_ROWS


def linear(
    x: Tensor,  # [rows, in] bfloat16, float16 or float32
    weight: NF4Weight,
    bias: Tensor | None,  # [out]
    workspace: Workspace,
    *,
    fixed: bool = False,
    deltas: Deltas | None = None,  # in the dtype of x
) -> Tensor:  # [rows, out] in the dtype of x
    """`y = x @ W.T + bias`, and with deltas `y[t, member m's columns] += v[t, m] @ b[pages]`: all rounded once.

    The same rows give the same bits, always. `fixed`: tiles and splits depend on the weight's shape alone, so that a
    row has the same bits among any others. Without it a weight is dequantized first where rows are many. float32 is
    multiplied exactly and slowly, without tensor cores, in the lowest tiles: higher ones would spill.
    """
    assert x.is_contiguous()
    assert x.shape[1] == weight.shape[1]
    rows, (out, width) = len(x), weight.shape
    if not folds(rows, fixed=fixed):
        assert deltas is None, "the deltas of so many rows are added by `kernels.lora.add_deltas`"
        dense = dequantize_into(workspace.scratch(out, width, x.dtype), weight)
        return torch.mm(x, dense.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, dense.t())
    y = x.new_empty(rows, out)
    apart = deltas and (rows > CROSSOVER_ROWS or deltas.members_of_tiles >= _MOST_COUNTED)
    v = shrink(x, deltas, workspace, fixed=fixed) if deltas and apart else None
    for first in range(0, rows, CROSSOVER_ROWS):  # which bounds the planes of a launch
        end = min(first + CROSSOVER_ROWS, rows)
        tall = BUCKETS[0] if x.dtype is torch.float32 else FIXED_ROWS if fixed else end - first
        tile = tile_for(out, width, tall, _capability(x.device))
        lanes = 1 if fixed else tile.splits
        launch(y, x, weight, bias, workspace, tile, (first, end), lanes=lanes, deltas=deltas, v=v)
    return y


def launch(
    y: Tensor,  # [rows, out], written from row `span[0]` to `span[1]`
    x: Tensor,  # [rows, in]
    weight: NF4Weight,
    bias: Tensor | None,  # [out]
    workspace: Workspace,
    tile: Tile,
    span: tuple[int, int],  # `span[0]` a multiple of 64
    *,
    lanes: int = 1,  # splits that share the jobs: one, or all
    deltas: Deltas | None = None,
    v: Tensor | None = None,  # by `kernels.lora.shrink`; without it the launch makes it, of all rows
) -> None:
    """`linear` by one launch with the tile given, for those who choose tiles themselves."""
    (first, end), (out, width) = span, weight.shape
    row_tiles, column_tiles = -(-(end - first) // tile.rows), -(-out // tile.columns)
    tiles = row_tiles * column_tiles
    half = _HALVES.get(x.dtype)
    grid: tuple[int, ...] = (row_tiles, column_tiles, tile.splits)
    planes, counters, programs = 0, 1, 0
    if tile.splits > 1:
        planes, counters = tiles * tile.splits * tile.rows * tile.columns, 1 + tiles
    shrunk = deltas if v is None else None  # by this launch
    if shrunk is not None:
        assert (first, end) == (0, len(x))
        assert shrunk.plan.tile_rows == GRANULE.value
        assert max(tiles, shrunk.members_of_tiles) < _MOST_COUNTED
        v = shrunk.room(x)
        programs = min(shrunk.sums, processors(_capability(x.device)))
        planes, counters = planes + shrunk.chunks * v.numel(), counters + shrunk.members_of_tiles
        grid = (programs + tiles * tile.splits,)
    _linear_kernel[grid](
        y,
        x,
        weight.packed,
        weight.absmax_t,
        weight.code,
        bias,
        shrunk.a if shrunk else None,
        shrunk.scale if shrunk else None,
        v,
        deltas.b if deltas else None,
        deltas.plan.buffer if deltas else None,
        workspace.planes(planes),
        workspace.counters(counters),
        first,
        end,
        out,
        width // 2,
        programs,
        deltas.granules if deltas else None,
        deltas.plan.hidden if deltas else None,
        deltas.plan.rows if deltas else None,
        ROW_TILES=row_tiles if shrunk else None,
        COLUMN_TILES=column_tiles if shrunk else None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCKS=tile.blocks,
        SPLITS=tile.splits,
        STAGES=tile.stages,
        JOBS=tile.jobs,
        ORDER=tile.order,
        ASSEMBLY=assembly(tile.lookup, half) if half else None,
        CONSTRAINTS=CONSTRAINTS,
        LANES=lanes,
        STARTS=deltas.starts if deltas else None,
        PURE=deltas is not None and deltas.pure(tile.columns),
        CHUNK=CHUNK,
        CHUNKS=deltas.chunks if deltas else None,
        STEP=STEP,
        EVEN=width % STEP == 0,
        NEAR=end - first <= tile.near,
        num_warps=tile.warps,
        **early(x),
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Of the chip; of Hopper where there is none, which is the chip that the interpreter stands for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@triton.jit(do_not_specialize=("first", "end", "programs", "granules", "plan_rows"))
def _linear_kernel(
    y: tl.tensor,  # [.., out]
    x: tl.tensor,  # [.., in]
    packed: tl.tensor,  # [out, in / 2] uint8
    absmax_t: tl.tensor,  # [in / 64, out] float32
    code: tl.tensor,  # [16] float32
    bias: tl.tensor,  # [out] or None
    a: tl.tensor,  # or None, where v is complete
    scale: tl.tensor,
    v: tl.tensor,  # or None
    b: tl.tensor,  # or None
    plan: tl.tensor,  # of the jobs, or None
    planes: tl.tensor,  # [tiles, SPLITS, ROWS, COLUMNS] float32, and those of shrink
    counters: tl.tensor,  # int32: one for v and all tiles, where SPLITS > 1 one for each tile, those of shrink
    first: tl.tensor,
    end: tl.tensor,
    out: tl.tensor,
    row_bytes: tl.tensor,  # of a weight's row
    programs: tl.tensor,  # that make v; they are the first
    granules: tl.tensor,  # of the plan, or None
    hidden: tl.tensor,  # columns of v for each member, or None
    plan_rows: tl.tensor,  # or None
    ROW_TILES: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    JOBS: tl.constexpr,
    ORDER: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    LANES: tl.constexpr,
    STARTS: tl.constexpr,
    PURE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    NEAR: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Rows come first in the grid: programs that read the same weights run side by side, and L2 serves them.

    Programs that make v are started before all others and wait for none, so those that need it may wait for them: they
    do after their weights. What varies from step to step is no constant, nor looked at for being 1: one compilation
    serves all buckets of a tile.
    """
    wait_for_earlier(EARLY)
    if a is None:
        row_tile, column_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        row_tiles, tiles = tl.num_programs(0), tl.num_programs(0) * tl.num_programs(1)
    else:
        row_tiles, tiles = ROW_TILES, ROW_TILES * COLUMN_TILES
        if tl.program_id(0) < programs:
            MEMBERS: tl.constexpr = len(STARTS) - 1
            own = tiles if SPLITS > 1 else 0
            shrink_tiles(
                tl.program_id(0), programs, x, a, scale, v, plan,
                planes + own * (SPLITS * ROWS * COLUMNS), counters + 1 + own, counters,
                plan_rows * MEMBERS * hidden, row_bytes * 2, granules, hidden,
                MEMBERS, GRANULE, STEP, CHUNK, CHUNKS, True, EVEN, SHRINK_STAGES,
            )  # fmt: skip
            return
        number = tl.program_id(0) - programs
        split, column_tile, row_tile = number // tiles, number % tiles // ROW_TILES, number % ROW_TILES
    first_row = first + row_tile * ROWS
    first_column = column_tile * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    acc = _sum_blocks(
        x + tl.minimum(row, end - 1)[:, None] * (row_bytes * 2),
        packed + tl.minimum(column, out - 1)[:, None] * row_bytes,
        absmax_t + tl.minimum(column, out - 1),
        code, split, out, row_bytes // 32,
        ROWS, COLUMNS, BLOCKS, SPLITS, STAGES, ORDER, ASSEMBLY, CONSTRAINTS, NEAR,
    )  # fmt: skip
    if plan is not None:
        lane = split if LANES == SPLITS else split << 20  # beyond all jobs: the first split does them
        ready = counters if a is not None else None
        acc = add_jobs(
            acc, v, b, plan, first_row, first_column, lane, LANES, ready, granules, hidden,
            STARTS, ROWS, COLUMNS, PURE, JOBS,
        )  # fmt: skip
    if SPLITS > 1:
        tile = column_tile * row_tiles + row_tile
        counter = counters + 1 + tile
        inside = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        plane = planes + tile * (SPLITS * ROWS * COLUMNS) + inside
        tl.store(plane + split * (ROWS * COLUMNS), acc)
        tl.debug_barrier()  # all threads have stored before one of them counts
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for other in range(SPLITS):
            acc += tl.load(plane + other * (ROWS * COLUMNS))
        tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
    if bias is not None:
        acc += tl.load(bias + column, mask=column < out, other=0.0).to(tl.float32)[None, :]
    there = y + row[:, None] * out + column[None, :]
    tl.store(there, narrow(acc, y.dtype.element_ty), mask=(row < end)[:, None] & (column < out)[None, :])
    if a is not None:
        done = tl.atomic_add(counters, 1 << 16, sem="relaxed", scope="gpu")  # above what `add_jobs` waits for
        if done >> 16 == tiles - 1:  # nobody waits any more
            tl.atomic_xchg(counters, 0, sem="relaxed", scope="gpu")


@triton.jit
def _sum_blocks(
    x: tl.tensor,  # [ROWS, 1] where each row begins
    packed: tl.tensor,  # [COLUMNS, 1] where each weight row begins
    absmax_t: tl.tensor,  # [COLUMNS] where each column begins
    code: tl.tensor,
    split: tl.tensor,
    out: tl.tensor,
    blocks: tl.tensor,  # of a row
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    ORDER: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    NEAR: tl.constexpr,
) -> tl.tensor:  # [ROWS, COLUMNS] float32
    """One split's share of k, block after block: `sum over blocks of (x's 64 k @ codes) * absmax`.

    A single row is read by all programs at once from one place of the second cache, which is slower than sixteen from
    sixteen places; loads of eight bytes (NEAR) go through the first cache, where a neighbour's is often found.

    Rows and columns past the edge read the last one's values: loads without masks compile to fewer instructions, and
    what is computed there is not stored.
    """
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    byte = tl.arange(0, 32)[None, :]
    k = tl.arange(0, 64)[None, :]
    share = tl.cdiv(blocks, SPLITS * BLOCKS) * BLOCKS
    for turn in tl.range(split * share, tl.minimum(split * share + share, blocks), BLOCKS, num_stages=STAGES):
        for i in tl.static_range(BLOCKS):
            block = turn + i
            scale = tl.load(absmax_t + block * out)
            codes = tl.load(packed + block * 32 + byte)
            there = x + block * 64 + k
            values = tl.load(tl.max_contiguous(there, (1, 4)) if NEAR else there)
            high, low = look_up(codes, code, values.dtype, ASSEMBLY, CONSTRAINTS)
            part = tl.zeros((ROWS, COLUMNS), tl.float32)
            if ORDER == "join":
                part = dot(values, tl.interleave(high, low).T, part)
            else:
                even, odd = tl.split(values.reshape(ROWS, 32, 2))
                part = dot(even, high.T, part)
                part = dot(odd, low.T, part)
            acc += part * scale[None, :]
    return acc
