"""Activations whose bits do not depend on where an element lies, near enough to torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from kernels.cpu.library import load
from server.model.kernel_set import compiled
from server.model.steady import SteadyGELU, SteadyGELUTanh, SteadySiLU, install_steady_activations

STEADY = {
    SteadySiLU: F.silu,
    SteadyGELU: F.gelu,
    SteadyGELUTanh: lambda x: F.gelu(x, approximate="tanh"),
}


def make(activation, rows):
    """GELU by the error function has no compiled form."""
    return activation() if activation is SteadyGELU else activation(rows)


EXTREMES = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e4, -1e4, 3e12, -3e12, 3e38, -3e38])


@pytest.fixture(params=["plain", "compiled"])
def rows(request):
    if request.param == "compiled" and load() is None:
        pytest.skip("the kernels are not built here")
    return None if request.param == "plain" else compiled(load()).rows


@pytest.mark.parametrize("activation", STEADY)
def test_near_torchs_own(activation, rows):
    steady = make(activation, rows)
    x = torch.cat([torch.randn(10_000) * 4, torch.linspace(-12, 12, 5001)])
    assert (steady(x) - STEADY[activation](x)).abs().le(1e-6 * x.abs().clamp_min(1)).all()


@pytest.mark.parametrize("activation", STEADY)
def test_extremes(activation, rows):
    got = make(activation, rows)(EXTREMES)
    assert got.isfinite().all()
    assert torch.allclose(got, EXTREMES.clamp_min(0), atol=1e-6)


@pytest.mark.parametrize("activation", STEADY)
@pytest.mark.parametrize("threads", [1, 2])
def test_any_slicing_gives_the_same_bits(activation, rows, threads):
    steady = make(activation, rows)
    x = torch.randn(70_001) * 3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = steady(x)
        for first, last in [(0, 1), (3, 20), (1, 70_000), (65_000, 70_001), (17, 40_018)]:
            assert torch.equal(steady(x[first:last]), whole[first:last])
            assert torch.equal(steady(x[first:last].clone()), whole[first:last])
        rows = x[:70_000].view(7, 10_000)
        assert torch.equal(steady(rows[:, 1:]), whole[:70_000].view(7, 10_000)[:, 1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "steady"),
    [
        ("silu", SteadySiLU),
        ("gelu", SteadyGELU),
        ("gelu_new", SteadyGELUTanh),
        ("gelu_pytorch_tanh", SteadyGELUTanh),
    ],
)
def test_installed_where_the_model_has_them(name, steady):
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"act": ACT2FN[name]}), nn.ReLU())
    install_steady_activations(model)
    assert type(model[1]["act"]) is steady
    assert type(model[0]) is nn.Linear
    assert type(model[2]) is nn.ReLU
