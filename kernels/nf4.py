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
from kernels.lora import ExpandJobs, add_jobs
from kernels.nf4_decode import NF4Weight as NF4Weight
from kernels.nf4_decode import dequantize_into
from kernels.portable import dot, look_up, narrow
from kernels.tiles import BUCKETS, CROSSOVER_ROWS, FIXED_ROWS, Tile, tile_for
from kernels.workspace import Workspace

_HALVES: dict[torch.dtype, Half] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def folds(rows: int, *, fixed: bool) -> bool:
    """Whether `linear` takes jobs at so many rows; where it does not, `kernels.lora.expand` adds them afterwards."""
    return fixed or rows <= CROSSOVER_ROWS


def linear(
    x: Tensor,  # [rows, in] bfloat16, float16 or float32
    weight: NF4Weight,
    bias: Tensor | None,  # [out]
    workspace: Workspace,
    *,
    fixed: bool = False,
    jobs: ExpandJobs | None = None,
    v: Tensor | None = None,  # [rows of the plan, members, columns] in the dtype of x
    b: Tensor | None = None,  # [pages, 16, out] in the dtype of x
) -> Tensor:  # [rows, out] in the dtype of x
    """`y = x @ W.T + bias`, and with jobs `y[t, member m's columns] += v[t, m] @ b[pages]`: all rounded once.

    The same rows give the same bits, always. `fixed`: tiles and splits depend on the weight's shape alone, so that a
    row has the same bits among any others. Without it a weight is dequantized first where rows are many. float32 is
    multiplied exactly and slowly, without tensor cores, in the lowest tiles: higher ones would spill.
    """
    assert x.is_contiguous()
    assert x.shape[1] == weight.shape[1]
    rows, (out, width) = len(x), weight.shape
    if not folds(rows, fixed=fixed):
        assert jobs is None, "the deltas of so many rows are added by `kernels.lora.expand`"
        dense = dequantize_into(workspace.scratch(out, width, x.dtype), weight)
        return torch.mm(x, dense.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, dense.t())
    y = x.new_empty(rows, out)
    for first in range(0, rows, CROSSOVER_ROWS):  # which bounds the planes of a launch
        end = min(first + CROSSOVER_ROWS, rows)
        tall = BUCKETS[0] if x.dtype is torch.float32 else FIXED_ROWS if fixed else end - first
        tile = tile_for(out, width, tall, _capability(x.device))
        lanes = 1 if fixed else tile.splits
        launch(y, x, weight, bias, workspace, tile, (first, end), lanes=lanes, jobs=jobs, v=v, b=b)
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
    jobs: ExpandJobs | None = None,
    v: Tensor | None = None,
    b: Tensor | None = None,
) -> None:
    """`linear` by one launch with the tile given, for those who choose tiles themselves."""
    (first, end), (out, width) = span, weight.shape
    grid = (-(-(end - first) // tile.rows), -(-out // tile.columns), tile.splits)
    tiles = grid[0] * grid[1]
    half = _HALVES.get(x.dtype)
    _linear_kernel[grid](
        y,
        x,
        weight.packed,
        weight.absmax_t,
        weight.code,
        bias,
        v,
        b,
        jobs.plan.buffer if jobs else None,
        workspace.planes(tiles * tile.splits * tile.rows * tile.columns if tile.splits > 1 else 0),
        workspace.counters(tiles if tile.splits > 1 else 0),
        first,
        end,
        out,
        width // 2,
        jobs.granules if jobs else None,
        jobs.plan.hidden if jobs else None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCKS=tile.blocks,
        SPLITS=tile.splits,
        STAGES=tile.stages,
        ORDER=tile.order,
        ASSEMBLY=assembly(tile.lookup, half) if half else None,
        CONSTRAINTS=CONSTRAINTS,
        LANES=lanes,
        STARTS=jobs.starts if jobs else None,
        PURE=jobs is not None and jobs.pure(tile.columns),
        num_warps=tile.warps,
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Of the chip; of Hopper where there is none, which is the chip that the interpreter stands for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@triton.jit(do_not_specialize=("first", "end", "granules"))
def _linear_kernel(
    y: tl.tensor,  # [.., out]
    x: tl.tensor,  # [.., in]
    packed: tl.tensor,  # [out, in / 2] uint8
    absmax_t: tl.tensor,  # [in / 64, out] float32
    code: tl.tensor,  # [16] float32
    bias: tl.tensor,  # [out] or None
    v: tl.tensor,  # or None
    b: tl.tensor,  # or None
    plan: tl.tensor,  # of the jobs, or None
    planes: tl.tensor,  # [tiles, SPLITS, ROWS, COLUMNS] float32
    counters: tl.tensor,  # [tiles] int32
    first: tl.tensor,
    end: tl.tensor,
    out: tl.tensor,
    row_bytes: tl.tensor,  # of a weight's row
    granules: tl.tensor,  # of the plan, or None
    hidden: tl.tensor,  # columns of v for each member, or None
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    ORDER: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    LANES: tl.constexpr,
    STARTS: tl.constexpr,
    PURE: tl.constexpr,
) -> None:
    """Rows come first in the grid: programs that read the same weights run side by side, and L2 serves them.

    What varies from step to step is no constant, nor looked at for being 1: one compilation serves all buckets of a
    tile.
    """
    split = tl.program_id(2)
    first_row = first + tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    acc = _sum_blocks(
        x + tl.minimum(row, end - 1)[:, None] * (row_bytes * 2),
        packed + tl.minimum(column, out - 1)[:, None] * row_bytes,
        absmax_t + tl.minimum(column, out - 1),
        code, split, out, row_bytes // 32,
        ROWS, COLUMNS, BLOCKS, SPLITS, STAGES, ORDER, ASSEMBLY, CONSTRAINTS,
    )  # fmt: skip
    if plan is not None:
        lane = split if LANES == SPLITS else split << 20  # beyond all jobs: the first split does them
        acc = add_jobs(
            acc, v, b, plan, first_row, first_column, lane, LANES, granules, hidden, STARTS, ROWS, COLUMNS, PURE
        )  # fmt: skip
    if SPLITS > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        inside = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        plane = planes + tile * (SPLITS * ROWS * COLUMNS) + inside
        tl.store(plane + split * (ROWS * COLUMNS), acc)
        tl.debug_barrier()  # all threads have stored before one of them counts
        if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for other in range(SPLITS):
            acc += tl.load(plane + other * (ROWS * COLUMNS))
        tl.atomic_xchg(counters + tile, 0, sem="relaxed", scope="gpu")
    if bias is not None:
        acc += tl.load(bias + tl.minimum(column, out - 1)).to(tl.float32)[None, :]
    there = y + row[:, None] * out + column[None, :]
    tl.store(there, narrow(acc, y.dtype.element_ty), mask=(row < end)[:, None] & (column < out)[None, :])


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
) -> tl.tensor:  # [ROWS, COLUMNS] float32
    """One split's share of k, block after block: `sum over blocks of (x's 64 k @ codes) * absmax`.

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
            values = tl.load(x + block * 64 + k)
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
