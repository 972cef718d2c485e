"""The base's products: NF4 against bitsandbytes, int8 against its bound, and rows whose bits are their own."""

import bitsandbytes.functional as bnb
import pytest
import torch

from kernels import reference


@pytest.mark.parametrize("shape", [(64, 64), (3, 128), (5, 13), (7, 9), (1, 2), (130, 66)])
@pytest.mark.parametrize("block", [64, 128])
def test_nf4_is_bitsandbytes_format(shape, block):
    weight = torch.randn(shape)
    packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    got = reference.dequantize_nf4(packed, state.absmax, state.code, shape, block)
    flat, flat_state = bnb.quantize_4bit(weight.flatten(), blocksize=block, quant_type="nf4")
    assert torch.equal(packed, flat)
    # One long row: where a block runs on into the next row, bitsandbytes 0.50 takes the wrong scales on AVX-512.
    assert torch.equal(got, bnb.dequantize_4bit(flat, flat_state).view(shape))


def test_nf4_reads_the_high_nibble_first():
    code = torch.arange(16.0)
    got = reference.dequantize_nf4(torch.tensor([0x1F, 0xA0], dtype=torch.uint8), torch.ones(1), code, (1, 4))
    assert got.tolist() == [[1, 15, 10, 0]]


def int8_weight(out, inside):
    w = torch.randn(out, inside)
    absmax = w.abs().amax(dim=1)
    return (w * 127 / absmax[:, None]).round().to(torch.int8), absmax


@pytest.mark.parametrize(("rows", "inside", "out"), [(1, 16, 8), (5, 33, 17), (40, 256, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_within_half_a_step_of_the_exact_product(rows, inside, out, dtype):
    x, (weight, absmax), bias = (
        torch.randn(rows, inside).to(dtype),
        int8_weight(out, inside),
        torch.randn(out),
    )
    held = weight.double() * absmax.double()[:, None] / 127
    exact = x.double() @ held.T + bias.to(dtype).double()
    half_step = x.double().abs().amax(dim=1, keepdim=True) / 254
    rounding = exact.abs() * (2**-6 if dtype is torch.bfloat16 else 1e-5) + 1e-2 * (dtype is torch.bfloat16)
    bound = half_step * held.abs().sum(dim=1) + rounding + 1e-5
    got = reference.int8_linear(x, weight, absmax, bias.to(dtype))
    assert got.dtype is dtype
    assert (got.double() - exact).abs().le(bound).all()


def test_int8_of_what_int8_can_hold_is_exact():
    weight, absmax = int8_weight(17, 33)
    x = torch.randint(-127, 128, (9, 33)).float()
    x[:, 0] = 127
    exact = x.double() @ (weight.double() * absmax.double()[:, None] / 127).T
    got = reference.int8_linear(x / 127 * 3, weight, absmax, None).double()
    assert torch.allclose(got, exact * 3 / 127, rtol=1e-5, atol=1e-5)


def test_int8_of_zeros_is_the_bias():
    weight, absmax = int8_weight(4, 8)
    bias = torch.randn(4)
    assert torch.equal(reference.int8_linear(torch.zeros(2, 8), weight, absmax, bias), bias.expand(2, 4))


@pytest.mark.parametrize(("inside", "out"), [(16, 8), (64, 24), (256, 1024), (1024, 64)])
@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8"])
def test_a_rows_bits_do_not_depend_on_how_many_rows_there_are(inside, out, held):
    x = torch.randn(300, inside)
    if held == "int8":
        weight, absmax = int8_weight(out, inside)
        x[7] *= 1000  # an outlier among the neighbours

        def product(rows):
            return reference.int8_linear(rows, weight, absmax, None)
    else:
        dtype = getattr(torch, held)
        x, w, bias = x.to(dtype), torch.randn(out, inside).to(dtype), torch.randn(out).to(dtype)

        def product(rows):
            return reference.linear(rows, w, bias)

    together = product(x)
    for count in (1, 2, 15, 16, 17, 100, 255):
        assert torch.equal(product(x[:count]), together[:count])
        assert torch.equal(product(x[-count:]), together[-count:])
    for first, last in [(1, 2), (5, 22), (3, 35), (150, 277)]:
        assert torch.equal(product(x[first:last]), together[first:last])


def test_linear_is_the_product_with_a_bias():
    x, weight, bias = torch.randn(5, 33), torch.randn(17, 33), torch.randn(17)
    exact = x.double() @ weight.double().T + bias.double()
    assert torch.allclose(reference.linear(x, weight, bias).double(), exact, atol=1e-5)


@pytest.mark.parametrize(("rows", "padded"), [(1, 16), (16, 16), (17, 32)])
def test_pad_rows_adds_zeros_at_the_end(rows, padded):
    x = torch.randn(2, rows, 3)
    got = reference.pad_rows(x)
    assert got.shape == (2, padded, 3)
    assert torch.equal(got[:, :rows], x)
    assert not got[:, rows:].any()
