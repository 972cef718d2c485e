"""Low-rank deltas of many adapters on a GPU: shrink (hidden -> rank) and expand (rank -> hidden) over pages.

A step's tiles and jobs come from `kernels/plans.py`. Sibling linears are one launch. Expand is a launch of its own, or
`add_jobs` inside another product's kernel, so that the deltas are rounded with the product, once. Knows nothing of how
pages came to the device. Source: Chen et al. 2023 (Punica) for shrink and expand; Sheng et al. 2023 (S-LoRA) for pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels import plans, portable
from kernels.plans import DeltaPlan
from kernels.workspace import Workspace

PAGE_RANK = tl.constexpr(plans.PAGE_RANK)
GRANULE = tl.constexpr(plans.GRANULE)
HEAD = tl.constexpr(plans.DELTA_HEAD)
RECORD = tl.constexpr(plans.DELTA_RECORD)
JOB = tl.constexpr(5)  # where a record's job begins

_CHUNK = 1024  # of the inputs: sums are made in chunks at fixed places, so that no bit shows how they were shared out
_FILL = 512  # programs that keep a large GPU busy
_MOST_PROGRAMS = 2048
# by rows of a tile: inputs that one turn of shrink's loop reads, and turns in flight
_STEPS = {16: (256, 4), 64: (128, 3)}
_EXPAND_STAGES = (
    5  # of which half pass while a job's numbers are fetched: its page is then read two turns ahead
)


# what varies from step to step is no constant: one compiled kernel serves all buckets
@triton.jit(do_not_specialize=["rows", "granules"])
def _shrink_kernel(
    x: tl.tensor,
    a: tl.tensor,
    scale: tl.tensor,
    v: tl.tensor,
    plan: tl.tensor,
    planes: tl.tensor,
    counters: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    granules: tl.tensor,
    v_width: tl.tensor,  # columns of v for each member
    MEMBERS: tl.constexpr,
    HEIGHT: tl.constexpr,  # rows of a tile
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,  # whether each chunk has a program of its own
    EVEN: tl.constexpr,  # whether inside is a multiple of STEP
    STAGES: tl.constexpr,
) -> None:
    member = tl.program_id(1)
    rank = tl.arange(0, PAGE_RANK)
    for tile in range(tl.program_id(0), tl.load(plan), tl.num_programs(0)):
        at = plan + HEAD + 2 * granules + tile * RECORD
        page = tl.load(at).to(tl.int64)
        row = tl.load(at + 1) + tl.arange(0, HEIGHT)
        mine = row < tl.load(at + 2)
        place = (row[:, None] * MEMBERS + member) * v_width + tl.load(at + 3) * PAGE_RANK + rank[None, :]
        weight = tl.load(at + 4).to(tl.float32, bitcast=True)
        factor = a + (page * MEMBERS + member) * PAGE_RANK * inside
        total = tl.zeros((HEIGHT, PAGE_RANK), tl.float32)
        complete = True
        if SPLIT:
            chunk = tl.program_id(2)
            part = _sum_chunk(x, factor, row, mine, chunk, inside, HEIGHT, STEP, CHUNK, EVEN, STAGES)
            room = rows * MEMBERS * v_width
            tl.store(planes + chunk * room + place, part, mask=mine[:, None])
            tl.debug_barrier()
            counter = counters + tile * MEMBERS + member
            complete = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == CHUNKS - 1
            if complete:
                for other in range(CHUNKS):
                    total += tl.load(planes + other * room + place, mask=mine[:, None], other=0.0)
                tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
        else:
            for chunk in range(CHUNKS):
                total += _sum_chunk(x, factor, row, mine, chunk, inside, HEIGHT, STEP, CHUNK, EVEN, STAGES)
        if complete:
            total *= tl.load(scale + page * MEMBERS + member) * weight
            tl.store(v + place, portable.narrow(total, v.dtype.element_ty), mask=mine[:, None])


@triton.jit
def _sum_chunk(
    x: tl.tensor,
    factor: tl.tensor,
    row: tl.tensor,
    mine: tl.tensor,
    chunk: tl.tensor,
    inside: tl.tensor,
    HEIGHT: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:  # [HEIGHT, PAGE_RANK] float32
    """The rows times a page's rank rows, over the inputs of one chunk."""
    part = tl.zeros((HEIGHT, PAGE_RANK), tl.float32)
    rank = tl.arange(0, PAGE_RANK)
    first = chunk * CHUNK
    for k in tl.range(first, tl.minimum(first + CHUNK, inside), STEP, num_stages=STAGES):
        at = k + tl.arange(0, STEP)
        here = x + row[:, None].to(tl.int64) * inside + at[None, :]
        there = factor + rank[None, :] * inside + at[:, None]
        if EVEN:
            values = tl.load(here, mask=mine[:, None], other=0.0)
            factors = tl.load(there)
        else:
            values = tl.load(here, mask=mine[:, None] & (at < inside)[None, :], other=0.0)
            factors = tl.load(there, mask=(at < inside)[:, None], other=0.0)
        part = portable.dot(values, factors, part)
    return part


def shrink(
    x: Tensor,  # [rows, in]
    a: Tensor,  # [pages, members, 16, in], as x
    scale: Tensor,  # [pages, members] float32
    plan: DeltaPlan,
    workspace: Workspace,
    *,
    fixed: bool = False,
) -> Tensor:  # [rows, members, plan.hidden]; only what a row's own pages wrote means something
    """`v[t, m, page's columns] = weight * scale[page, m] * x[t] @ a[page, m].T` for each page of t's segment.

    Sums in float32, in chunks of 1024 inputs added in their order; a program for each chunk where tiles are few.
    Programs go from tile to tile, so that a bucket with room for many costs little when few are in use. `fixed` wants
    a plan made `fixed` too: a row's bits are then its own.
    """
    assert x.is_contiguous()
    assert a.is_contiguous()
    assert x.dtype is a.dtype
    members, inside = a.shape[1], a.shape[3]
    assert x.shape[1] == inside
    assert len(x) <= plan.rows
    assert not fixed or plan.tile_rows == 16
    v = x.new_empty(plan.rows, members, plan.hidden)
    chunks = -(-inside // _CHUNK)
    split = chunks > 1 and (plan.rows <= plans.FEW_ROWS or plan.tiles * members < _FILL)
    step, stages = _STEPS[plan.tile_rows]
    lanes = chunks if split else 1
    _shrink_kernel[(min(plan.tiles, -(-_MOST_PROGRAMS // (members * lanes))), members, lanes)](
        x,
        a,
        scale,
        v,
        plan.buffer,
        workspace.planes(chunks * v.numel() if split else 0),
        workspace.counters(plan.tiles * members if split else 0),
        plan.rows,
        inside,
        granules=-(-plan.rows // plans.GRANULE),
        v_width=plan.hidden,
        MEMBERS=members,
        HEIGHT=plan.tile_rows,
        STEP=step,
        CHUNK=_CHUNK,
        CHUNKS=chunks,
        SPLIT=split,
        EVEN=inside % step == 0,
        STAGES=stages,
        num_warps=4,
    )
    return v


@triton.jit
def add_jobs(
    acc: tl.tensor,  # [HEIGHT, WIDTH] float32
    v: tl.tensor,  # [rows, members, v_width]
    b: tl.tensor,  # [pages, 16, sum of widths]
    plan: tl.tensor,
    first_row: tl.tensor,  # of the tile, a multiple of 16
    first_column: tl.tensor,
    lane: tl.tensor,  # this program does jobs lane, lane + LANES, ... of its tile's; a negative one does none
    LANES: tl.constexpr,
    granules: tl.tensor,
    v_width: tl.tensor,
    STARTS: tl.constexpr,  # (0, the members' widths summed up)
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PURE: tl.constexpr,  # whether all widths are multiples of WIDTH: no tile holds columns of two members
    STAGES: tl.constexpr = 3,
) -> tl.tensor:  # [HEIGHT, WIDTH] float32
    """`acc + v @ b` of every job that has rows in the tile: one page of an adapter is sixteen more inputs.

    It reads no row of v but those of the job. Jobs are taken in the order of pages, so that with one lane a row's sum
    does not depend on its neighbours.
    """
    MEMBERS: tl.constexpr = len(STARTS) - 1
    total: tl.constexpr = STARTS[MEMBERS]
    row = first_row + tl.arange(0, HEIGHT)
    column = first_column + tl.arange(0, WIDTH)
    rank = tl.arange(0, PAGE_RANK)
    granule = first_row // GRANULE
    last_granule = tl.minimum(granule + (HEIGHT - 1) // GRANULE, granules - 1)
    first_job = tl.load(plan + HEAD + granule)
    end_job = tl.load(plan + HEAD + granules + last_granule)
    if lane < 0:
        end_job = first_job
    first_member = 0
    last_member = 0
    for i in tl.static_range(1, MEMBERS):
        first_member += (first_column >= STARTS[i]).to(tl.int32)
        last_member += (first_column + WIDTH > STARTS[i]).to(tl.int32)
    if PURE:
        last_member = first_member
    for member in range(first_member, last_member + 1):
        low = 0
        high = total
        for i in tl.static_range(1, MEMBERS):
            low = tl.where(member >= i, STARTS[i], low)
            high = tl.where(member < i, tl.minimum(high, STARTS[i]), high)
        own = (column >= low) & (column < high)
        for job in tl.range(first_job + lane, end_job, LANES, num_stages=STAGES):
            at = plan + HEAD + 2 * granules + job * RECORD + JOB
            page = tl.load(at).to(tl.int64)
            start = tl.load(at + 1)
            end = tl.load(at + 2)
            hidden = tl.load(at + 3) * PAGE_RANK
            mine = (row >= start) & (row < end)
            here = v + (row[:, None] * MEMBERS + member) * v_width + hidden + rank[None, :]
            there = b + (page * PAGE_RANK + rank[:, None]) * total + column[None, :]
            values = tl.load(here, mask=mine[:, None], other=0.0)
            factors = tl.load(there) if PURE else tl.load(there, mask=own[None, :], other=0.0)
            acc = portable.dot(values, factors, acc)
    return acc


@triton.jit(do_not_specialize=["granules"])
def _expand_kernel(
    y: tl.tensor,
    v: tl.tensor,
    b: tl.tensor,
    plan: tl.tensor,
    granules: tl.tensor,
    v_width: tl.tensor,
    STARTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PURE: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    first_row = tl.program_id(1) * HEIGHT
    first_column = tl.program_id(0) * WIDTH
    granule = first_row // GRANULE
    last_granule = tl.minimum(granule + (HEIGHT - 1) // GRANULE, granules - 1)
    first_job = tl.load(plan + HEAD + granule)
    end_job = tl.load(plan + HEAD + granules + last_granule)
    if first_job >= end_job:
        return
    acc = tl.zeros((HEIGHT, WIDTH), tl.float32)
    acc = add_jobs(
        acc, v, b, plan, first_row, first_column, 0, 1, granules, v_width, STARTS, HEIGHT, WIDTH, PURE, STAGES
    )
    row = first_row + tl.arange(0, HEIGHT)
    adapted = row < 0
    for job in range(first_job, end_job):
        at = plan + HEAD + 2 * granules + job * RECORD + JOB
        adapted = adapted | ((row >= tl.load(at + 1)) & (row < tl.load(at + 2)))
    column = first_column + tl.arange(0, WIDTH)
    MEMBERS: tl.constexpr = len(STARTS) - 1
    total: tl.constexpr = STARTS[MEMBERS]
    place = y + row[:, None].to(tl.int64) * total + column[None, :]
    inside = adapted[:, None] & (column < total)[None, :]
    acc += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, portable.narrow(acc, y.dtype.element_ty), mask=inside)


def expand(
    y: Tensor,  # [rows, sum of widths], written
    v: Tensor,  # [plan.rows, members, plan.hidden]
    b: Tensor,  # [pages, 16, sum of widths], as v
    widths: tuple[int, ...],  # one per member
    plan: DeltaPlan,
    *,
    fixed: bool = False,
) -> None:
    """`y[t, member m's columns] += v[t, m] @ b[pages][:, those columns]`, added in float32 and rounded once.

    Rows without an adapter are neither read nor written.
    """
    assert y.is_contiguous()
    assert b.is_contiguous()
    assert v.dtype is b.dtype
    assert y.shape[1] == b.shape[2] == sum(widths)
    assert len(y) <= plan.rows
    assert not fixed or plan.tile_rows == 16
    width, height = 128, plan.tile_rows
    jobs = ExpandJobs(plan, widths)
    _expand_kernel[(-(-sum(widths) // width), -(-len(y) // height))](
        y,
        v,
        b,
        plan.buffer,
        granules=jobs.granules,
        v_width=plan.hidden,
        STARTS=jobs.starts,
        HEIGHT=height,
        WIDTH=width,
        PURE=jobs.pure(width),
        STAGES=_EXPAND_STAGES,
        num_warps=4,
    )


@dataclass(frozen=True, slots=True)
class ExpandJobs:
    """What `add_jobs` is compiled for, beside the size of its tile."""

    plan: DeltaPlan
    widths: tuple[int, ...]  # one per member

    @property
    def granules(self) -> int:
        """Runs of 16 rows that the plan lists jobs for."""
        return -(-self.plan.rows // plans.GRANULE)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each member's columns begin, and where the last one's end."""
        return (0, *(sum(self.widths[: i + 1]) for i in range(len(self.widths))))

    def pure(self, width: int) -> bool:
        """Whether tiles of so many columns hold columns of one member only."""
        return all(each % width == 0 for each in self.widths)


def add_deltas(
    y: Tensor,  # [rows, sum of widths], written
    x: Tensor,  # [rows, in]
    a: Tensor,  # [pages, members, 16, in]
    b: Tensor,  # [pages, 16, sum of widths]
    scale: Tensor,  # [pages, members] float32
    widths: tuple[int, ...],
    plan: DeltaPlan,
    workspace: Workspace,
    *,
    fixed: bool = False,
) -> None:
    """`y += expand(shrink(x))` of every segment: two launches, whatever the mix."""
    v = shrink(x, a, scale, plan, workspace, fixed=fixed)
    expand(y, v, b, widths, plan, fixed=fixed)
