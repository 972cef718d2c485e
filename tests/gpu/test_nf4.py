"""NF4 products on the device: what the interpreter cannot show, which is assembly, races and every tile as compiled."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from kernels.lookup import CONSTRAINTS, NF4_CODE, assembly  # noqa: E402
from kernels.nf4 import linear  # noqa: E402
from kernels.nf4_decode import dequantize  # noqa: E402
from kernels.portable import look_up  # noqa: E402
from kernels.tiles import CROSSOVER_ROWS  # noqa: E402
from kernels.workspace import Workspace  # noqa: E402
from tests.kernels.naive import relative_error  # noqa: E402
from tests.triton.nf4_case import DTYPES, ROWS, Adapted, weight_of  # noqa: E402

SHAPES = [(6144, 4096), (4096, 14336), (1100, 320)]


@pytest.fixture
def workspace():
    held = Workspace("cuda")
    yield held
    held.check()


@triton.jit
def _look_up_kernel(
    packed, code, high, low, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr
):
    at = tl.arange(0, 1024)
    values = look_up(tl.load(packed + at), code, DTYPE, ASSEMBLY, CONSTRAINTS)
    tl.store(high + at, values[0])
    tl.store(low + at, values[1])


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("lookup", ["shuffle", "permute", "mixed", None])
def test_every_byte_in_every_place(lookup, half):
    dtype = getattr(torch, half)
    everything = torch.arange(1024, device="cuda")
    packed = (everything + everything // 256).to(torch.uint8)  # each byte stands in each place of four
    code = torch.tensor(NF4_CODE, device="cuda")
    high, low = packed.new_empty(1024, dtype=dtype), packed.new_empty(1024, dtype=dtype)
    text = assembly(lookup, half) if lookup else None
    _look_up_kernel[(1,)](packed, code, high, low, getattr(tl, half), text, CONSTRAINTS, num_warps=1)
    assert torch.equal(high, code[packed.int() >> 4].to(dtype))
    assert torch.equal(low, code[packed.int() & 15].to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bucket_equals_the_twin(dtype, shape, workspace):
    weight, exact = weight_of(*shape, "cuda")
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for rows in (1, 15, 16, 32, 33, 64, 100, CROSSOVER_ROWS, CROSSOVER_ROWS + 1):
        x = torch.randn(rows, shape[1], device="cuda").to(dtype)
        error = relative_error(linear(x, weight, bias, workspace), x.double() @ exact.T + bias)
        assert error < DTYPES[dtype], rows
    assert torch.equal(dequantize(weight, torch.float32), exact.float())


def test_float32_is_exact(workspace):
    weight, exact = weight_of(200, 320, "cuda")
    x = torch.randn(21, 320, device="cuda")
    assert relative_error(linear(x, weight, None, workspace), x.double() @ exact.T) < DTYPES[torch.float32]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("widths", [(4096, 1024, 1024), (70, 30, 21)], ids=str)
def test_folds_the_deltas_in(widths, fixed, workspace):
    most = 8 if fixed else 4  # 224 or 112 rows: beyond 128 only fixed tiles take jobs
    for repeats in (1, 3, most):
        adapted = Adapted(ROWS * repeats, widths, 512, torch.bfloat16, fixed=fixed, device="cuda")
        assert relative_error(adapted.ours(workspace), adapted.naive()) < 2 * DTYPES[torch.bfloat16], repeats


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fixed_rows_have_the_same_bits_in_any_number(shape, workspace):
    weight, _ = weight_of(*shape, "cuda")
    x = torch.randn(2 * CROSSOVER_ROWS + 5, shape[1], device="cuda", dtype=torch.bfloat16)
    whole = linear(x, weight, None, workspace, fixed=True)
    for first, end in ((0, 1), (3, 4), (0, 16), (5, 75), (64, 128), (250, 270), (500, 517)):
        part = linear(x[first:end].contiguous(), weight, None, workspace, fixed=True)
        assert torch.equal(part, whole[first:end]), (first, end)


@pytest.mark.parametrize("rows", [1, 16, 32, 64, 128])
def test_the_last_to_arrive_sums_in_order(rows, workspace):
    """Whoever comes last, the bits are the same: a missing fence would show in some of so many launches."""
    weight, _ = weight_of(4096, 4096, "cuda")
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    first = linear(x, weight, None, workspace)
    different = sum((linear(x, weight, None, workspace) != first).any() for _ in range(300))
    assert int(different) == 0


def test_a_captured_graph_replays_the_product(workspace):
    weight, exact = weight_of(6144, 4096, "cuda")
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    linear(x, weight, None, workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, weight, None, workspace)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, linear(x, weight, None, workspace))
    assert relative_error(y, x.double() @ exact.T) < DTYPES[torch.bfloat16]
