"""NF4 products on the device with every tile that the tables name for a Llama of 8 billion weights, against float64."""

import pytest
import torch

from kernels import lora, nf4
from kernels.lora import Deltas
from kernels.nf4_decode import NF4Weight, dequantize
from kernels.tiles import BUCKETS, CROSSOVER_ROWS
from kernels.workspace import Workspace
from tests.bench.gpu_model import LLAMA_8B
from tests.bench.gpu_products import joined_shapes, plan_of
from tests.kernels.naive import relative_error

CUDA = torch.device("cuda")
MOST_ADAPTERS = 40  # more of their sums than processors
SHAPES = {**joined_shapes(LLAMA_8B), "small": (192, 80)}


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
    a = torch.randn(MOST_ADAPTERS, 2, 16, inside, device=CUDA).bfloat16() / inside**0.5
    b = torch.randn(MOST_ADAPTERS, 16, out, device=CUDA).bfloat16()
    scale = torch.rand(MOST_ADAPTERS, 2, device=CUDA)
    for rows in (1, *BUCKETS, *(bucket + 5 for bucket in BUCKETS), CROSSOVER_ROWS, CROSSOVER_ROWS + 3):
        x = torch.randn(rows, inside, device=CUDA).bfloat16()
        want = x.double() @ exact.T
        got = nf4.linear(x, weight, None, workspace, fixed=fixed)
        assert relative_error(got, want) < 1e-2, rows
        assert torch.equal(got, nf4.linear(x, weight, None, workspace, fixed=fixed)), rows
        if not nf4.folds(rows, fixed=fixed):
            continue
        for adapters in {1, min(rows, 3), min(rows, MOST_ADAPTERS)}:
            deltas = Deltas(a, b, scale, widths, plan_of(rows, adapters, CUDA, fixed))
            adapted = nf4.linear(x, weight, None, workspace, fixed=fixed, deltas=deltas)
            apart = got.clone()
            lora.add_deltas(apart, x, deltas, workspace, fixed=fixed)
            case = f"{rows} rows, {adapters} adapters"
            assert relative_error(adapted, apart.double()) < 2e-2, case
            assert relative_error(adapted, got.double()) > 2e-2, f"{case}: they did nothing"
            for _ in range(3):
                again = nf4.linear(x, weight, None, workspace, fixed=fixed, deltas=deltas)
                assert torch.equal(adapted, again), case
            workspace.check()
