"""Shrink and expand of a whole step against their twins, whatever the mix of adapters in it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import lora, plans, reference
from kernels.plans import DeltaPlan
from kernels.segments import Segment, segments_of
from kernels.workspace import Workspace
from tests.kernels.naive import PAGE_RANK, DeltaStep, relative_error

# (in, widths of the members): a tile of columns that holds several members, one each, and sums of three chunks
SHAPES = {
    "one": (48, (16,)),
    "odd": (33, (17, 5, 3)),
    "straddling": (64, (100, 60, 30)),
    "aligned": (40, (128, 256)),
    "deep": (2100, (40, 8)),
}
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (rows, pages, weights) in the order of rows; page 2 is nobody's
MIXES = {
    "identical": [(5, (5,), (1.0,))],
    "distinct": [(1, (5,), (1.0,)), (1, (6, 1), (1.0, 1.0)), (1, (), ()), (1, (3, 0, 4), (1.0,) * 3)],
    "zipf": [(2, (), ()), (17, (3, 0), (1.0, 1.0)), (1, (5,), (1.0,)), (2, (), ()), (1, (6,), (1.0,))],
    "blends": [(2, (5, 6, 1), (0.25, 0.75, 0.75)), (1, (5,), (1.0,)), (2, (1, 5), (0.5, 1.5))],
    "base": [(3, (), ())],
}


class Step(DeltaStep):
    """The same by Triton's kernels."""

    def plan(self, *, room=0, fixed=False) -> DeltaPlan:
        """The step's plan, or one of a bucket of `room` rows, of which a launch covers every tile it may have."""
        rows = room or len(self.x)
        most = max((len(segment.pages) for segment in self.segments), default=1)
        table = np.full(DeltaPlan.sizes(rows, most), -(2**30), np.int32)
        used = DeltaPlan.fill(table, self.segments, rows, fixed=fixed)
        return DeltaPlan.view(
            torch.from_numpy(table).to(torch.get_default_device()),
            rows,
            most,
            used=None if room else used,
            fixed=fixed,
        )

    def deltas(self, plan: DeltaPlan) -> lora.Deltas:
        return lora.Deltas(self.a, self.b, self.scale, self.widths, plan)

    def ours(self, workspace=None, *, room=0, fixed=False) -> Tensor:
        y, workspace = self.y.clone(), workspace or Workspace(torch.get_default_device())
        plan = self.plan(room=room, fixed=fixed)
        lora.add_deltas(y, self.x, self.deltas(plan), workspace, fixed=fixed)
        workspace.check()
        return y

    def alone(self, row: int) -> "Step":
        segments = tuple(
            Segment(0, 1, segment.pages, segment.weights)
            for segment in self.segments
            if segment.start <= row < segment.end
        )
        return replace(self, x=self.x[row : row + 1], y=self.y[row : row + 1], segments=segments)


def make_step(shape, mix, dtype=torch.float32) -> Step:
    inside, widths = SHAPES[shape]
    rows = MIXES[mix] if isinstance(mix, str) else mix
    a = torch.full((7, len(widths), PAGE_RANK, inside), torch.nan)
    b = torch.full((7, PAGE_RANK, sum(widths)), torch.nan)
    scale = torch.full((7, len(widths)), torch.nan)
    for page in {page for _, pages, _ in rows for page in pages}:
        a[page], b[page] = torch.randn_like(a[page]) / 4, torch.randn_like(b[page]) / 4
        scale[page] = torch.rand(len(widths)) + 0.5
    count = sum(count for count, _, _ in rows)
    x, y = torch.randn(count, inside).to(dtype), torch.randn(count, sum(widths)).to(dtype)
    return Step(x, y, a.to(dtype), b.to(dtype), scale, widths, segments_of(rows))


CASES = [
    *((shape, "zipf", torch.bfloat16) for shape in SHAPES),
    *(("odd", mix, dtype) for mix in MIXES for dtype in (torch.float32, torch.bfloat16)),
    ("straddling", "blends", torch.float32),
    ("aligned", "distinct", torch.float16),
    ("deep", "distinct", torch.float32),
]


@pytest.mark.parametrize(("shape", "mix", "dtype"), CASES)
def test_deltas_of_any_mix(shape, mix, dtype):
    step = make_step(shape, mix, dtype)
    got = step.ours()
    assert relative_error(got, step.naive()) <= DTYPES[dtype]
    assert relative_error(got, step.twins().double()) <= DTYPES[dtype]
    if step.segments:
        assert relative_error(step.y, step.naive()) > 10 * DTYPES[dtype], (
            "the deltas are too small to be seen"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shrink_is_its_twin(dtype):
    """v itself, before anything is added: where a row has no page it is what the memory held."""
    step = make_step("odd", "blends", dtype)
    v = lora.shrink(step.x, step.deltas(step.plan()), Workspace(torch.get_default_device()))
    assert v.dtype is dtype
    for segment in step.segments:
        held = len(segment.pages) * PAGE_RANK
        want = reference.shrink(step.x, step.a, step.scale, segment)
        rows = v[segment.start : segment.end]
        assert relative_error(rows[:, :, :held], want.double()) <= DTYPES[dtype]
        assert rows[:, :, held:].isnan().all()


@pytest.mark.parametrize("mix", ["distinct", "zipf"])
def test_rows_of_the_base_are_untouched(mix):
    step = make_step("odd", mix)
    base = torch.ones(len(step.x), dtype=torch.bool)
    for segment in step.segments:
        base[segment.start : segment.end] = False
    step.y[base] = -0.0
    step.x[base] = torch.nan
    got = step.ours()
    assert torch.equal(got[base].view(torch.int32), step.y[base].view(torch.int32))
    assert not torch.equal(got[~base], step.y[~base])


def test_a_member_of_scale_zero_is_left_alone():
    step = make_step("straddling", [(3, (0, 1), (1.0, 1.0))])
    step.scale[:2, 1] = 0
    got = step.ours()
    assert torch.equal(got[:, 100:160], step.y[:, 100:160])
    assert not torch.equal(got[:, :100], step.y[:, :100])


def test_a_buckets_plan_is_the_same_plan():
    """More tiles in the launch than the step has, and rows that nobody fills."""
    step = make_step("deep", "blends")
    workspace = Workspace(torch.get_default_device())
    exact = step.ours(workspace)
    assert torch.equal(step.ours(workspace, room=6), exact)
    assert torch.equal(step.ours(workspace), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_make_high_tiles(monkeypatch, dtype):
    monkeypatch.setattr(plans, "FEW_ROWS", 8)
    monkeypatch.setattr(lora, "_FILL", 1 if dtype is torch.float32 else 512)
    step = make_step(
        "deep", [(1, (5,), (1.0,)), (70, (6, 1), (1.0, 0.5)), (3, (), ()), (2, (0,), (1.0,))], dtype
    )
    assert step.plan().tile_rows == 64
    assert relative_error(step.ours(), step.naive()) <= DTYPES[dtype]


def test_few_programs_go_from_tile_to_tile(monkeypatch):
    step = make_step("deep", "blends")
    want = step.ours()
    monkeypatch.setattr(lora, "_MOST_PROGRAMS", 8)
    assert torch.equal(step.ours(), want)


@pytest.mark.parametrize("mix", ["zipf", "blends"])
@pytest.mark.parametrize("many", [False, True])
def test_fixed_a_rows_bits_are_its_own(monkeypatch, mix, many):
    """Alone and among neighbours, where tiles are few and chunks are shared out, and where they are many.

    In float32, where every rounding shows.
    """
    step = make_step("deep", mix)
    alone = {row: step.alone(row).ours(fixed=True)[0] for row in range(2, len(step.x), 6)}
    if many:
        monkeypatch.setattr(plans, "FEW_ROWS", 3)
        monkeypatch.setattr(lora, "_FILL", 1)
    together = step.ours(fixed=True)
    for row, bits in alone.items():
        assert torch.equal(bits, together[row]), f"row {row}"


def test_a_page_past_two_thousand_million_factors(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    step = make_step("one", [(1, (5,), (1.0,))], torch.bfloat16)
    inside, last = 48, 2**31 // (16 * 48) + 1
    a = torch.empty(
        last + 1, 1, PAGE_RANK, inside, dtype=torch.bfloat16
    )  # no memory but for the page written
    b = torch.empty(last + 1, PAGE_RANK, 16, dtype=torch.bfloat16)
    scale = torch.empty(last + 1, 1)
    assert a[:last].numel() > 2**31
    a[last], b[last], scale[last] = step.a[5], step.b[5], step.scale[5]
    far = replace(step, a=a, b=b, scale=scale, segments=(Segment(0, 1, (last,), (1.0,)),))
    assert torch.equal(far.ours(), step.ours())
