"""The base's product for siblings, by how their weights are held."""

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from server.model.linear import DenseLinear, FourBitLinear, FourBitWeight, Int8Linear, ModuleLinear

BIASES = {"none": [False, False, False], "all": [True, True, True], "some": [True, False, True]}
WIDTHS = [64, 32, 96]


def members(make, biases="none", **given):
    linears = []
    for width, bias in zip(WIDTHS, BIASES[biases], strict=True):
        plain = nn.Linear(64, width, bias=bias)
        held = make(64, width, bias=bias, **given)
        held.load_state_dict(plain.state_dict())
        linears.append(held.to("cpu"))
    return linears


def want(weights, linears, x):
    parts = [
        x.double() @ weight.double().T + (0 if linear.bias is None else linear.bias.double())
        for weight, linear in zip(weights, linears, strict=True)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("biases", BIASES)
def test_dense(biases):
    linears = members(nn.Linear, biases)
    weights = [linear.weight.detach().clone() for linear in linears]
    base = DenseLinear.of(linears)
    x = torch.randn(5, 64)
    assert torch.allclose(base(x).double(), want(weights, linears, x), atol=1e-5)
    assert (base.bias is None) == (biases == "none")


def test_dense_weights_exist_once():
    linears = members(nn.Linear)
    weights = [linear.weight.detach().clone() for linear in linears]
    base = DenseLinear.of(linears)
    for linear, weight in zip(linears, weights, strict=True):
        assert torch.equal(linear.weight, weight)
        assert linear.weight.untyped_storage().data_ptr() == base.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("twice", [False, True], ids=["absmax plain", "absmax quantized"])
def test_four_bit(biases, twice):
    linears = members(
        Linear4bit, biases, quant_type="nf4", compress_statistics=twice, compute_dtype=torch.float32
    )
    weights = [bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state) for linear in linears]
    base = FourBitLinear.of(linears, torch.float32)
    x = torch.randn(5, 64)
    assert torch.allclose(base(x).double(), want(weights, linears, x), atol=1e-5)
    for held, weight in zip(base.weights, weights, strict=True):
        assert torch.equal(held.dequantize(torch.float32), weight.float())
        assert (held.kind, held.block, held.shape) == ("nf4", 64, tuple(weight.shape))


def test_four_bit_takes_the_codes_without_a_copy():
    (linear, *_) = members(Linear4bit, quant_type="nf4")
    assert FourBitWeight.of(linear).packed.data_ptr() == linear.weight.data_ptr()


def test_four_bit_refuses_weights_that_were_repacked():
    (linear, *_) = members(Linear4bit, quant_type="nf4")
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(AssertionError, match="repacked"):
        FourBitWeight.of(linear)


def test_four_bit_refuses_weights_that_are_not_quantized_yet():
    with pytest.raises(AssertionError, match="not quantized"):
        FourBitWeight.of(Linear4bit(64, 64, quant_type="nf4"))


def same_bits_in_any_company(product, x):
    """Whether each of the first rows is the same bits among 1, 2, ... as among all."""
    whole = product(x)
    return all(torch.equal(product(x[:count]), whole[:count]) for count in (1, 2, 3, 8, 16, 17))


@torch.no_grad()
def test_bitsandbytes_own_product_could_not_stand_in_for_few_rows():
    """Why plain PyTorch dequantizes for one row as for many.

    Where bitsandbytes has a kernel for few rows (AVX-512 BF16) it rounds to bfloat16; elsewhere it dequantizes too,
    and a row's bits depend on how many rows there are.
    """
    held = Linear4bit(256, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    held.load_state_dict(nn.Linear(256, 128, bias=False).state_dict())
    held = held.to("cpu").eval()
    base, x = FourBitLinear.of([held], torch.float32), torch.randn(20, 256)
    exact = x.double() @ base.weights[0].dequantize(torch.float32).double().T
    assert torch.allclose(base(x).double(), exact, atol=1e-5)
    assert same_bits_in_any_company(base, x)
    assert not (same_bits_in_any_company(held, x) and torch.allclose(held(x).double(), exact, atol=1e-5))


@pytest.mark.parametrize("biases", BIASES)
def test_int8(biases):
    linears = members(Linear8bitLt, biases, has_fp16_weights=False, threshold=0.0)
    weights = [linear.weight.data.double() * linear.weight.SCB.double()[:, None] / 127 for linear in linears]
    base = Int8Linear.of(linears, torch.float32)
    x = torch.randn(5, 64)
    step = x.double().abs().amax(dim=1, keepdim=True) / 254
    bound = step * torch.cat(weights).abs().sum(dim=1) + 1e-5
    assert (base(x).double() - want(weights, linears, x)).abs().le(bound).all()


@pytest.mark.parametrize("count", [1, 3])
def test_modules_as_they_are(count):
    linears = members(nn.Linear, "some")[:count]
    x = torch.randn(5, 64)
    assert torch.equal(ModuleLinear(tuple(linears))(x), torch.cat([linear(x) for linear in linears], dim=1))


def test_biases_come_in_the_compute_dtype():
    linears = members(Linear4bit, "some", quant_type="nf4")
    bias = FourBitLinear.of(linears, torch.bfloat16).bias
    assert bias.dtype is torch.bfloat16
    assert torch.equal(bias[:64], linears[0].bias.to(torch.bfloat16))
    assert not bias[64:96].any()
    assert torch.equal(bias[96:], linears[2].bias.to(torch.bfloat16))
