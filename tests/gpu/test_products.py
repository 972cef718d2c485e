"""NF4 products on the device: every look-up of a byte, and every tile that the tables name, against float64."""

import pytest
import torch
import triton
import triton.language as tl

from kernels import lora, nf4
from kernels.lookup import CONSTRAINTS, NF4_CODE, assembly
from kernels.lora import ExpandJobs
from kernels.nf4_decode import NF4Weight, dequantize
from kernels.portable import look_up
from kernels.tiles import BUCKETS, CROSSOVER_ROWS
from kernels.workspace import Workspace
from tests.bench.gpu_model import LLAMA_8B
from tests.bench.gpu_products import joined_shapes, plan_of
from tests.kernels.naive import relative_error

CUDA = torch.device("cuda")
SHAPES = {**joined_shapes(LLAMA_8B), "small": (192, 80)}


@triton.jit
def _both(packed, code, high, low, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr):
    at = tl.arange(0, 256)
    first, second = look_up(tl.load(packed + at), code, high.dtype.element_ty, ASSEMBLY, CONSTRAINTS)
    tl.store(high + at, first)
    tl.store(low + at, second)


@pytest.mark.parametrize("lookup", ["shuffle", "permute", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_byte_is_looked_up(lookup, dtype):
    code = torch.tensor(NF4_CODE, dtype=torch.float32, device=CUDA)
    packed = torch.arange(256, device=CUDA).to(torch.uint8)
    high, low = torch.full((2, 256), torch.nan, dtype=dtype, device=CUDA).unbind()
    text = assembly(lookup, str(dtype).removeprefix("torch.")) if lookup else None
    _both[(1,)](packed, code, high, low, text, CONSTRAINTS, num_warps=1)
    assert torch.equal(high, code.to(dtype)[packed.long() >> 4])
    assert torch.equal(low, code.to(dtype)[packed.long() & 15])


def weight_of(inside: int, out: int) -> NF4Weight:
    packed = torch.randint(0, 256, (inside * out // 2,), dtype=torch.uint8, device=CUDA)
    return NF4Weight.of(packed, torch.rand(inside * out // 64, device=CUDA) * 0.02 + 0.01, (out, inside))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("fixed", [False, True])
def test_every_tile(name, fixed):
    """With and without adapters; the same bits again."""
    inside, out = SHAPES[name]
    weight, workspace = weight_of(inside, out), Workspace(CUDA)
    exact = dequantize(weight, torch.float32).double()
    widths = (out // 2, out - out // 2)
    a = torch.randn(4, 2, 16, inside, device=CUDA).bfloat16() / inside**0.5
    b = torch.randn(4, 16, out, device=CUDA).bfloat16()
    scale = torch.rand(4, 2, device=CUDA)
    for rows in (1, *BUCKETS, *(bucket + 5 for bucket in BUCKETS), CROSSOVER_ROWS, CROSSOVER_ROWS + 3):
        x = torch.randn(rows, inside, device=CUDA).bfloat16()
        want = x.double() @ exact.T
        got = nf4.linear(x, weight, None, workspace, fixed=fixed)
        assert relative_error(got, want) < 1e-2, rows
        assert torch.equal(got, nf4.linear(x, weight, None, workspace, fixed=fixed)), rows
        if not nf4.folds(rows, fixed=fixed):
            continue
        plan = plan_of(rows, min(rows, 3), CUDA, fixed)
        v = lora.shrink(x, a, scale, plan, workspace, fixed=fixed)
        given = {"fixed": fixed, "jobs": ExpandJobs(plan, widths), "v": v, "b": b}
        adapted = nf4.linear(x, weight, None, workspace, **given)
        apart = got.clone()
        lora.expand(apart, v, b, widths, plan, fixed=fixed)
        assert relative_error(adapted, apart.double()) < 2e-2, rows
        assert relative_error(adapted, got.double()) > 2e-2, f"{rows}: the adapters did nothing"
        assert torch.equal(adapted, nf4.linear(x, weight, None, workspace, **given)), rows
        workspace.check()
