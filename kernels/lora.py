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

CHUNK = 1024  # of the inputs: sums are made in chunks at fixed places, so that no bit shows how they were shared out
_FILL = 512  # programs that keep a large GPU busy
_MOST_PROGRAMS = 2048
STEP = 128  # inputs that one turn of shrink's loop reads
_STAGES = {16: 6, 64: 3}  # turns in flight, by rows of a tile
_EXPAND_JOBS = 4  # of one turn of its loop, which waits for memory once for all of them
_EXPAND_STAGES = 5  # of which half pass while a job's numbers are fetched: its page is read two turns ahead


# what varies from step to step is no constant: one compiled kernel serves all buckets
@triton.jit(do_not_specialize=["granules"])
def _shrink_kernel(
    x: tl.tensor,
    a: tl.tensor,
    scale: tl.tensor,
    v: tl.tensor,
    plan: tl.tensor,
    planes: tl.tensor,
    counters: tl.tensor,
    room: tl.tensor,
    inside: tl.tensor,
    granules: tl.tensor,
    v_width: tl.tensor,
    MEMBERS: tl.constexpr,
    HEIGHT: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    portable.wait_for_earlier(EARLY)
    program, programs = tl.program_id(0), tl.num_programs(0)
    shrink_tiles(
        program, programs, x, a, scale, v, plan, planes, counters, None, room, inside, granules, v_width,
        MEMBERS, HEIGHT, STEP, CHUNK, CHUNKS, SPLIT, EVEN, STAGES,
    )  # fmt: skip


@triton.jit
def shrink_tiles(
    program: tl.tensor,  # takes every `programs`-th of the sums
    programs: tl.tensor,
    x: tl.tensor,  # [rows, inside]
    a: tl.tensor,  # [pages, MEMBERS, 16, inside]
    scale: tl.tensor,  # [pages, MEMBERS] float32
    v: tl.tensor,  # [rows of the plan, MEMBERS, v_width]
    plan: tl.tensor,
    planes: tl.tensor,  # [CHUNKS, size of v] float32, where SPLIT
    counters: tl.tensor,  # [tiles, MEMBERS] int32, where SPLIT
    ready: tl.tensor,  # counts the tiles' members that are in v; or None
    room: tl.tensor,  # size of v
    inside: tl.tensor,
    granules: tl.tensor,
    v_width: tl.tensor,  # columns of v for each member
    MEMBERS: tl.constexpr,
    HEIGHT: tl.constexpr,  # rows of a tile
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,  # whether each chunk is a sum of its own
    EVEN: tl.constexpr,  # whether inside is a multiple of STEP
    STAGES: tl.constexpr,
) -> None:
    """Sums are numbered tile by tile, then member by member, then chunk by chunk."""
    rank = tl.arange(0, PAGE_RANK)
    EACH: tl.constexpr = CHUNKS if SPLIT else 1
    for number in range(program, tl.load(plan) * (MEMBERS * EACH), programs):
        tile = number // (MEMBERS * EACH)
        member = number // EACH % MEMBERS
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
            chunk = number % CHUNKS
            part = _sum_chunk(x, factor, row, mine, chunk, inside, HEIGHT, STEP, CHUNK, EVEN, STAGES)
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
            if ready is not None:
                tl.debug_barrier()
                tl.atomic_add(ready, 1, sem="release", scope="gpu")


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


@dataclass(frozen=True, slots=True)
class Deltas:
    """What a step's rows read of a pool's pages, at one group of siblings."""

    a: Tensor  # [pages, members, 16, in]
    b: Tensor  # [pages, 16, sum of widths], as a
    scale: Tensor  # [pages, members] float32
    widths: tuple[int, ...]  # one per member
    plan: DeltaPlan

    @property
    def chunks(self) -> int:
        """Of the inputs: each is summed by itself."""
        return -(-self.a.shape[3] // CHUNK)

    @property
    def members_of_tiles(self) -> int:
        """That make up v, at most."""
        return self.plan.tiles * len(self.widths)

    @property
    def sums(self) -> int:
        """That shrink is made of when chunks are shared out, at most."""
        return self.members_of_tiles * self.chunks

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

    def room(self, x: Tensor) -> Tensor:  # [plan.rows, members, plan.hidden]
        """For v, which is shrink's result; only what a row's own pages write there means something."""
        assert x.is_contiguous()
        assert self.a.is_contiguous()
        assert self.b.is_contiguous()
        assert x.dtype is self.a.dtype is self.b.dtype
        assert self.a.shape[1:] == (len(self.widths), plans.PAGE_RANK, x.shape[1])
        assert self.b.shape[2] == sum(self.widths)
        assert len(x) <= self.plan.rows
        return x.new_empty(self.plan.rows, len(self.widths), self.plan.hidden)


def shrink(
    x: Tensor,  # [rows, in]
    deltas: Deltas,
    workspace: Workspace,
    *,
    fixed: bool = False,
) -> Tensor:  # [plan.rows, members, plan.hidden]; only what a row's own pages wrote means something
    """`v[t, m, page's columns] = weight * scale[page, m] * x[t] @ a[page, m].T` for each page of t's segment.

    Sums in float32, in chunks of 1024 inputs added in their order; a program for each chunk where tiles are few.
    Programs go from sum to sum, so that a bucket with room for many tiles costs little when few are in use. `fixed`
    wants a plan made `fixed` too: a row's bits are then its own.
    """
    plan = deltas.plan
    assert not fixed or plan.tile_rows == 16
    v, inside = deltas.room(x), x.shape[1]
    split = deltas.chunks > 1 and (plan.rows <= plans.FEW_ROWS or deltas.members_of_tiles < _FILL)
    sums = deltas.sums if split else deltas.members_of_tiles
    _shrink_kernel[(min(sums, _MOST_PROGRAMS),)](
        x,
        deltas.a,
        deltas.scale,
        v,
        plan.buffer,
        workspace.planes(deltas.chunks * v.numel() if split else 0),
        workspace.counters(deltas.members_of_tiles if split else 0),
        v.numel(),
        inside,
        granules=deltas.granules,
        v_width=plan.hidden,
        MEMBERS=len(deltas.widths),
        HEIGHT=plan.tile_rows,
        STEP=STEP,
        CHUNK=CHUNK,
        CHUNKS=deltas.chunks,
        SPLIT=split,
        EVEN=inside % STEP == 0,
        STAGES=_STAGES[plan.tile_rows],
        num_warps=4,
        **portable.early(x),
    )
    return v


@triton.jit
def _jobs_of(plan: tl.tensor, first_row: tl.tensor, granules: tl.tensor, HEIGHT: tl.constexpr) -> tl.tensor:
    """(first, end) of the jobs that have rows in a tile."""
    granule = first_row // GRANULE
    last_granule = tl.minimum(granule + (HEIGHT - 1) // GRANULE, granules - 1)
    return tl.load(plan + HEAD + granule), tl.load(plan + HEAD + granules + last_granule)


@triton.jit
def add_jobs(
    acc: tl.tensor,  # [HEIGHT, WIDTH] float32
    v: tl.tensor,  # [rows, members, v_width]
    b: tl.tensor,  # [pages, 16, sum of widths]
    plan: tl.tensor,
    first_row: tl.tensor,  # of the tile, a multiple of 16
    first_column: tl.tensor,
    lane: tl.tensor,  # this program does jobs lane, lane + LANES, ... of its tile's; one past the last does none
    LANES: tl.constexpr,
    ready: tl.tensor,  # counts what is in v, by other programs of this launch; None where v is complete
    granules: tl.tensor,
    v_width: tl.tensor,
    STARTS: tl.constexpr,  # (0, the members' widths summed up)
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PURE: tl.constexpr,  # whether all widths are multiples of WIDTH: no tile holds columns of two members
    JOBS: tl.constexpr,  # of a turn
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
    inner = tl.arange(0, JOBS * PAGE_RANK)
    first_job, end_job = _jobs_of(plan, first_row, granules, HEIGHT)
    if ready is not None:  # noqa: SIM102 - decided when compiled
        if first_job + lane < end_job:
            complete = tl.load(plan) * MEMBERS
            while (tl.atomic_add(ready, 0, sem="acquire", scope="gpu") & 0xFFFF) < complete:
                pass
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
        for turn in tl.range(first_job + lane, end_job, JOBS * LANES, num_stages=STAGES):
            job = turn + inner // PAGE_RANK * LANES
            there = job < end_job
            at = plan + HEAD + 2 * granules + job * RECORD + JOB
            page = tl.max_constancy(tl.load(at, mask=there, other=0), PAGE_RANK)
            start = tl.max_constancy(tl.load(at + 1, mask=there, other=0), PAGE_RANK)
            end = tl.max_constancy(tl.load(at + 2, mask=there, other=0), PAGE_RANK)
            place = tl.max_constancy(tl.load(at + 3, mask=there, other=0), PAGE_RANK)
            mine = (row[:, None] >= start[None, :]) & (row[:, None] < end[None, :])
            hidden = place * PAGE_RANK + inner % PAGE_RANK
            here = v + (row[:, None] * MEMBERS + member) * v_width + hidden[None, :]
            factor = (
                b + (page * PAGE_RANK + inner % PAGE_RANK)[:, None].to(tl.int64) * total + column[None, :]
            )
            values = tl.load(here, mask=mine, other=0.0)
            wanted = there[:, None] if PURE else there[:, None] & own[None, :]
            acc = portable.dot_in_parts(values, tl.load(factor, mask=wanted, other=0.0), acc, PAGE_RANK)
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
    JOBS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    portable.wait_for_earlier(EARLY)
    first_row = tl.program_id(1) * HEIGHT
    first_column = tl.program_id(0) * WIDTH
    first_job, end_job = _jobs_of(plan, first_row, granules, HEIGHT)
    if first_job >= end_job:
        return
    acc = tl.zeros((HEIGHT, WIDTH), tl.float32)
    acc = add_jobs(
        acc, v, b, plan, first_row, first_column, 0, 1, None, granules, v_width,
        STARTS, HEIGHT, WIDTH, PURE, JOBS, STAGES,
    )  # fmt: skip
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
    deltas: Deltas,
    *,
    fixed: bool = False,
) -> None:
    """`y[t, member m's columns] += v[t, m] @ b[pages][:, those columns]`, added in float32 and rounded once.

    Rows without an adapter are neither read nor written.
    """
    plan, out = deltas.plan, sum(deltas.widths)
    assert y.is_contiguous()
    assert v.dtype is deltas.b.dtype
    assert y.shape[1] == out
    assert len(y) <= plan.rows
    assert not fixed or plan.tile_rows == 16
    width, height = 128, plan.tile_rows
    _expand_kernel[(-(-out // width), -(-len(y) // height))](
        y,
        v,
        deltas.b,
        plan.buffer,
        granules=deltas.granules,
        v_width=plan.hidden,
        STARTS=deltas.starts,
        HEIGHT=height,
        WIDTH=width,
        PURE=deltas.pure(width),
        JOBS=_EXPAND_JOBS,
        STAGES=_EXPAND_STAGES,
        num_warps=4,
        **portable.early(y),
    )


def add_deltas(
    y: Tensor,  # [rows, sum of widths], written
    x: Tensor,  # [rows, in]
    deltas: Deltas,
    workspace: Workspace,
    *,
    fixed: bool = False,
) -> None:
    """`y += expand(shrink(x))` of every segment: two launches, whatever the mix."""
    expand(y, shrink(x, deltas, workspace, fixed=fixed), deltas, fixed=fixed)
