"""What happens to a row between two products: near the formula, and bits that no neighbour changes."""

import math

import pytest
import torch

from kernels.cpu import operations


@pytest.fixture
def library(kernels):
    if kernels is None:
        pytest.skip("plain PyTorch is what these are compared with")
    return kernels


def relative(got, want):
    """The largest error of an element, over its own magnitude."""
    return ((got.double() - want).abs() / want.abs().clamp_min(1e-30)).max()


@pytest.mark.parametrize("width", [1, 5, 31, 64, 2048, 2050])
def test_rms_norm(library, width):
    x, weight = torch.randn(7, width) * 3, torch.randn(width)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    got = operations.rms_norm(library, x, weight, 1e-6)
    assert relative(got, exact) <= 1e-6
    for row in range(7):
        assert torch.equal(operations.rms_norm(library, x[row], weight, 1e-6), got[row])


def test_rms_norm_of_heads_that_lie_apart(library):
    x, weight = torch.randn(1, 5, 40)[..., :24].view(1, 5, 3, 8), torch.randn(8)
    got = operations.rms_norm(library, x, weight, 1e-5)
    assert torch.equal(got, operations.rms_norm(library, x.contiguous(), weight, 1e-5))
    assert got.shape == x.shape


def exact_activation(name, x):
    x = x.double()
    if name == "silu":
        return x / (1 + torch.exp(-x))
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gate(library, name):
    x, up = torch.randn(9, 77)[:, 3:] * 4, torch.randn(9, 80)[:, :74]
    got = operations.gate(library, name, x, up)
    assert (got.double() - exact_activation(name, x) * up.double()).abs().max() <= 2e-6
    assert torch.equal(got, operations.gate(library, name, x) * up)


def test_silu_is_right_to_a_few_units_in_the_last_place(library):
    """So is the exponential in it, which attention uses too."""
    x = torch.cat([torch.linspace(-86, 90, 100_001), torch.logspace(-30, 0, 1000)])
    assert relative(operations.gate(library, "silu", x), exact_activation("silu", x)) <= 4e-7


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_extremes(library, name):
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e4, -1e4, 3e12, -3e12, torch.inf, torch.nan])
    got = operations.gate(library, name, x)
    assert torch.allclose(got[:-1], x[:-1].clamp_min(0), atol=1e-6)
    assert got[-1].isnan()


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_any_slicing_gives_the_same_bits(library, threads, name):
    x = torch.randn(70_001) * 3
    whole = operations.gate(library, name, x)
    for first, last in [(0, 1), (3, 20), (1, 70_000), (65_000, 70_001), (17, 40_018)]:
        assert torch.equal(operations.gate(library, name, x[first:last]), whole[first:last])
    rows = operations.gate(library, name, x[:70_000].view(7, 10_000)[:, 1:])
    assert torch.equal(rows, whole[:70_000].view(7, 10_000)[:, 1:])


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 10), (4, 64), (2, 80)])
def test_rotate_has_torchs_bits(library, heads, width):
    x = torch.randn(heads, 6, width).transpose(0, 1)
    cos, sin = torch.randn(6, width), torch.randn(6, width)
    one, two = x.chunk(2, dim=-1)
    want = x * cos[:, None] + torch.cat((-two, one), dim=-1) * sin[:, None]
    assert torch.equal(operations.rotate(library, x, cos, sin), want)
