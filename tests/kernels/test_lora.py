"""Shrink and expand against the sum over tokens, pages and members, whatever the mix of adapters in a step."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu import operations
from kernels.segments import FlatSegments, Segment, segments_of
from tests.kernels.naive import PAGE_RANK, DeltaStep, add_deltas, relative_error

# (in, widths of the members); BLAS promises no bits for widths that are no multiple of 8, and no model has such
SHAPES = {"one": (16, (16,)), "odd": (33, (17, 5, 3)), "qkv": (64, (64, 32, 32))}
WIDE = {"strips": (129, (1100, 513)), "thin": (5, (1, 2))}  # past a strip of columns, and less than a vector
# pool dtype, dtype of activations, and what rounding to the coarser of the two may cost
DTYPES = {
    "fp32": (torch.float32, torch.float32, 1e-5),
    "bf16 pool": (torch.bfloat16, torch.float32, 2e-2),
    "bf16 rows": (torch.float32, torch.bfloat16, 2e-2),
    "bf16": (torch.bfloat16, torch.bfloat16, 2e-2),
}
PAGES_OF = {"contiguous": [(0,), (1, 2), (3, 4, 5, 6)], "scattered": [(5,), (6, 1), (3, 0, 4, 2)]}
POPULARITY = {
    "identical": [(0, 13)],
    "distinct": [(0, 1), (1, 1), (2, 1), (None, 1)],
    "uniform": [(0, 4), (None, 3), (1, 5), (2, 2)],
    "zipf": [(2, 17), (1, 4), (None, 2), (0, 1)],
}


class Step(DeltaStep):
    """The same by the library, or in plain PyTorch."""

    def ours(self, kernels=None) -> Tensor:
        if kernels is None:
            return self.twins()
        y = self.y.clone()
        deltas = operations.Deltas.of(kernels, self.a, self.b, self.scale, self.widths)
        deltas.add(y, self.x, FlatSegments.of(self.segments))
        return y


def make_step(shape, rows, pool=torch.float32, activations=torch.float32) -> Step:
    """`rows` holds (token count, pages, weights), as `segments_of` takes them."""
    inside, widths = (SHAPES | WIDE)[shape]
    read = {page for _, pages, _ in rows for page in pages}
    pages = max(read, default=0) + 2
    a = torch.full((pages, len(widths), PAGE_RANK, inside), torch.nan)
    b = torch.full((pages, PAGE_RANK, sum(widths)), torch.nan)
    scale = torch.full((pages, len(widths)), torch.nan)
    for page in sorted(read):
        a[page], b[page] = torch.randn_like(a[page]), torch.randn_like(b[page])
        scale[page] = torch.rand(len(widths)) + 0.5
    count = sum(count for count, _, _ in rows)
    x, y = torch.randn(count, inside), torch.randn(count, sum(widths))
    return Step(
        x.to(activations), y.to(activations), a.to(pool), b.to(pool), scale, widths, segments_of(rows)
    )


def adapted_rows(popularity, placing, weight=1.0):
    for adapter, count in POPULARITY[popularity]:
        pages = () if adapter is None else PAGES_OF[placing][adapter]
        yield count, pages, (weight,) * len(pages)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("placing", PAGES_OF)
def test_deltas_of_any_mix(kernels, dtype, shape, popularity, placing):
    pool, activations, gate = DTYPES[dtype]
    if kernels is not None and activations is torch.bfloat16:
        pytest.skip("the compiled kernels add to float32 rows")
    step = make_step(shape, list(adapted_rows(popularity, placing)), pool, activations)
    assert relative_error(step.ours(kernels), step.naive()) <= gate
    assert relative_error(step.y, step.naive()) > 10 * gate, "the deltas are too small to be seen"


@pytest.mark.parametrize("rank", [1, 3, 15, 16])
def test_rows_past_the_rank_add_nothing(kernels, rank):
    """The pool keeps zeros there: an adapter of a lower rank is its own rows and no more."""
    step = make_step("odd", [(5, (0,), (1.0,))])
    step.a[0, :, rank:], step.b[0, rank:] = 0, 0
    cut = add_deltas(
        step.y, step.x, step.a[:1, :, :rank], step.b[:1, :rank], step.scale, step.widths, step.segments
    )
    assert relative_error(step.ours(kernels), cut) <= 1e-5


def test_a_blend_is_the_weighted_sum_of_its_parts(kernels):
    blend = make_step("qkv", [(6, (4, 1, 2), (0.25, 0.75, 0.75))])
    assert relative_error(blend.ours(kernels), blend.naive()) <= 1e-5
    parts = []
    for pages, weights in [((4,), (0.25,)), ((1, 2), (0.75, 0.75))]:
        blend.segments = (Segment(0, 6, pages, weights),)
        parts.append(blend.ours(kernels).double() - blend.y.double())
    blend.segments = (Segment(0, 6, (4, 1, 2), (0.25, 0.75, 0.75)),)
    assert relative_error(blend.ours(kernels), blend.y.double() + sum(parts)) <= 1e-5


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf"])
def test_rows_of_the_base_are_untouched(kernels, popularity):
    step = make_step("odd", list(adapted_rows(popularity, "scattered")))
    base = torch.ones(len(step.x), dtype=torch.bool)
    for segment in step.segments:
        base[segment.start : segment.end] = False
    assert base.any()
    assert torch.equal(step.ours(kernels)[base], step.y[base])


def test_a_member_of_scale_zero_is_left_alone(kernels):
    step = make_step("qkv", [(5, (0, 1), (1.0, 1.0))])
    step.scale[:2, 1] = 0
    got = step.ours(kernels)
    assert torch.equal(got[:, 64:96], step.y[:, 64:96])
    assert not torch.equal(got[:, :64], step.y[:, :64])


@pytest.mark.parametrize("shape", ["one", "qkv"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16 pool", "bf16"])
def test_a_rows_bits_are_its_own(kernels, shape, dtype):
    """Alone, first of many or last of many: the same bits."""
    pool, activations, _ = DTYPES[dtype]
    if kernels is not None and activations is torch.bfloat16:
        pytest.skip("the compiled kernels add to float32 rows")
    step = make_step(shape, [(37, (2, 0), (1.0, 0.5))], pool, activations)
    together = step.ours(kernels)
    x, y = step.x, step.y
    for rows in (slice(0, 1), slice(36, 37), slice(5, 22), slice(20, 37)):
        step.x, step.y = x[rows], y[rows]
        step.segments = (Segment(0, len(step.x), (2, 0), (1.0, 0.5)),)
        assert torch.equal(step.ours(kernels), together[rows])


def test_where_pages_lie_does_not_show(kernels):
    """The same factors side by side (read in place) and scattered (gathered): the same bits."""
    step = make_step("qkv", [(9, (1, 2), (1.0, 1.0))])
    order = [2, 3, 1, 0]
    moved = Step(step.x, step.y, step.a[order], step.b[order], step.scale[order], step.widths, ())
    moved.segments = (Segment(0, 9, (2, 0), (1.0, 1.0)),)
    assert torch.equal(moved.ours(kernels), step.ours(kernels))


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("pool", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 4, 70])
def test_widths_that_fill_no_vector_or_many_strips(kernels, shape, pool, rows):
    if kernels is None:
        pytest.skip("plain PyTorch promises no bits for such widths, and tests its values above")
    step = make_step(shape, [(2, (), ()), (rows, (1, 0), (1.0, 0.5))], pool)
    assert relative_error(step.ours(kernels), step.naive()) <= 1e-5


ROWS = st.lists(
    st.tuples(
        st.integers(1, 40),
        st.sampled_from([(), (0,), (1,), (2, 3), (3, 2), (0, 1, 2)]),
        st.sampled_from([1.0, 0.25]),
    ),
    min_size=1,
    max_size=7,
)


@given(ROWS, st.sampled_from([torch.float32, torch.bfloat16]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=10)
def test_any_neighbours_leave_a_rows_bits_alone(kernels, threads, rows, pool):
    """Each row of a mixed step, on any number of threads, against the same row alone."""
    if kernels is None:
        pytest.skip("tested above: plain PyTorch is slow on so many steps")
    step = make_step("qkv", [(count, pages, (weight,) * len(pages)) for count, pages, weight in rows], pool)
    together = step.ours(kernels)
    assert relative_error(together, step.naive()) <= 1e-5
    x, y = step.x, step.y
    for segment in step.segments:
        for row in {segment.start, (segment.start + segment.end) // 2, segment.end - 1}:
            alone = Step(
                x[row : row + 1], y[row : row + 1], step.a, step.b, step.scale, step.widths,
                (Segment(0, 1, segment.pages, segment.weights),),
            )  # fmt: skip
            assert torch.equal(alone.ours(kernels)[0], together[row])


@pytest.mark.parametrize("count", [1, 16])
def test_work_shared_among_threads_is_the_same_work(kernels, threads, count):
    """Wide enough to be shared: one adapter of many rows, and many adapters of a row each."""
    if kernels is None:
        pytest.skip("torch shares its own products")
    pages = torch.randn(count, 2, PAGE_RANK, 512), torch.randn(count, PAGE_RANK, 3000), torch.rand(count, 2)
    segments = tuple(Segment(i * 16 // count, (i + 1) * 16 // count, (i,), (1.0,)) for i in range(count))
    step = Step(torch.randn(16, 512), torch.randn(16, 3000), *pages, (2000, 1000), segments)
    assert relative_error(step.ours(kernels), step.naive()) <= 1e-5
    torch.set_num_threads(3 - threads)
    other = step.ours(kernels)
    torch.set_num_threads(threads)
    assert torch.equal(step.ours(kernels), other)
