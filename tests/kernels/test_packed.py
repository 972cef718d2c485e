"""The compiled products against the plain ones: every instruction set, odd sizes, rows whose bits are their own."""

from functools import cache

import bitsandbytes.functional as bnb
import pytest
import torch

from kernels import reference
from kernels.cpu import operations
from kernels.cpu.library import INSTRUCTION_SETS
from tests.kernels import emulation

SHAPES = [(32, 64), (1, 64), (33, 128), (160, 192), (95, 320), (256, 2048)]  # (out, in)
ROWS = [1, 2, 3, 4, 5, 6, 7, 13, 16, 31, 129]


@pytest.fixture(params=INSTRUCTION_SETS)
def library(request):
    return emulation.library(request.param)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@cache
def quantized(shape):
    """Codes, scales, and what they stand for."""
    codes, state = bnb.quantize_4bit(torch.randn(shape), blocksize=64, quant_type="nf4")
    return codes, state.absmax, reference.dequantize_nf4(codes, state.absmax, state.code, shape)


def nf4(library, shape):
    """A packed matrix, and what it holds."""
    codes, absmax, weight = quantized(shape)
    return operations.pack_nf4(library, codes, absmax, shape), weight


def bf16(library, shape):
    weight = torch.randn(shape).bfloat16().float()
    packed = operations.pack_plain(library, weight)
    assert packed.kind == "bf16"
    return packed, weight


def f32(library, shape):
    weight = torch.randn(shape)
    packed = operations.pack_plain(library, weight)
    assert packed.kind == "f32"
    return packed, weight


def bf16_dot(library, shape):
    """By their own name: only what is fast here is chosen by itself."""
    if library.instruction_set == "avx512" and not operations.run(library, "has_bf16_dot"):
        pytest.skip("this processor has no AVX512_BF16")
    weight = torch.randn(shape).bfloat16()
    packed = operations.PackedWeight.empty(library, "bf16_dot", shape)
    operations.run(library, "pack_bf16_dot", weight.data_ptr(), packed.data.data_ptr(), *shape)
    return packed, weight.float()


def assert_near(got, x, weight, bias):
    """Within a few roundings of the exact product, element by element."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    bound = 2e-6 * (x.double().abs() @ weight.double().abs().T) + 1e-6
    assert (got.double() - exact).abs().le(bound).all()


@pytest.mark.parametrize("pack", [nf4, bf16, f32])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product(library, pack, shape):
    packed, weight = pack(library, shape)
    bias = torch.randn(shape[0])
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        assert_near(operations.linear(library, x, packed, bias), x, weight, bias)
        assert_near(operations.linear(library, x, packed, None), x, weight, None)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 1), (40, 63), (40, 100)])
def test_the_product_with_rows_rounded_to_bfloat16(library, shape):
    packed, weight = bf16_dot(library, shape)
    bias = torch.randn(shape[0])
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        got = operations.linear(library, x, packed, bias)
        assert_near(got, x.bfloat16(), weight, bias)
        assert ((got - x @ weight.T - bias).abs() <= 2**-8 * (x.abs() @ weight.abs().T) + 1e-5).all()
    x[0, 0] = float("nan")
    found = operations.linear(library, x, packed, None)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()


def test_plain_weights_are_in_pairs_where_int8_has_a_dot_product_for_them(bytes_library):
    there = operations.run(bytes_library, "has_bf16_dot")
    if bytes_library.instruction_set != "avx512":
        assert not there
    packed = operations.pack_plain(bytes_library, torch.randn(40, 64).bfloat16())
    assert packed.kind == ("bf16_dot" if there else "bf16")
    assert operations.pack_plain(bytes_library, torch.randn(40, 64)).kind == "f32"


@pytest.mark.parametrize("pack", [bf16, f32])
@pytest.mark.parametrize("inside", [1, 63, 65, 100])
def test_plain_weights_may_have_any_width(library, pack, inside):
    packed, weight = pack(library, (40, inside))
    x = torch.randn(3, inside)
    assert_near(operations.linear(library, x, packed, None), x, weight, None)
    assert_near(operations.linear(library, x[:1], packed, None), x[:1], weight, None)


@pytest.mark.parametrize("pack", [nf4, bf16, f32, bf16_dot])
@pytest.mark.parametrize("shape", [(95, 320), (256, 512)])
@pytest.mark.usefixtures("two_threads")
def test_a_rows_bits_are_its_own(library, pack, shape):
    """Alone, among any number of others, on one thread or two; an infinite neighbour changes nothing."""
    packed, _ = pack(library, shape)
    x, bias = torch.randn(150, shape[1]), torch.randn(shape[0])
    x[7] = float("inf")
    together = operations.linear(library, x, packed, bias)
    for count in range(1, 65):
        assert torch.equal(
            operations.linear(library, x[8 : 8 + count], packed, bias), together[8 : 8 + count]
        )
    for row in (0, 6, 8, 127, 128, 149):
        assert torch.equal(
            operations.linear(library, x[row : row + 1], packed, bias), together[row : row + 1]
        )
    torch.set_num_threads(1)
    assert torch.equal(operations.linear(library, x[8:], packed, bias), together[8:])


@pytest.fixture(params=INSTRUCTION_SETS)
def bytes_library(request):
    return emulation.library(request.param, "int8")


@pytest.mark.parametrize("shape", [(32, 64), (33, 128), (160, 512)])
def test_the_product_in_8_bit_integers(bytes_library, shape):
    codes, absmax, weight = quantized(shape)
    packed = operations.pack_nf4(bytes_library, codes, absmax, shape)
    assert packed.kind == "int8"
    values, bias = bnb.get_4bit_type("nf4", device="cpu"), torch.randn(shape[0])
    for rows in (1, 2, 5, 13, 31):
        x = torch.randn(rows, shape[1])
        x[0, :64] = 0
        got = operations.linear(bytes_library, x, packed, bias)
        want = reference.nf4_int8_linear(x, codes, absmax, values, shape) + bias
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
        exact = x @ weight.T + bias
        assert (got - exact).norm() <= 2e-2 * exact.norm()
        assert rows == 1 or not torch.allclose(got, exact, rtol=1e-4, atol=1e-4)


def test_bytes_keep_rows_apart_and_hide_nothing(bytes_library):
    """A row's bits are its own, and what is not finite stays visible in its own row alone."""
    packed = operations.pack_nf4(bytes_library, *quantized((96, 256))[:2], (96, 256))
    x = torch.randn(40, 256)
    x[3, 70], x[4, 130] = float("nan"), float("inf")
    together = operations.linear(bytes_library, x, packed, None)
    assert together[3:5].isnan().all()
    for row in (0, 2, 5, 39):
        assert together[row].isfinite().all()
        assert torch.equal(
            operations.linear(bytes_library, x[row : row + 1], packed, None), together[row : row + 1]
        )
    assert torch.equal(operations.linear(bytes_library, x[5:12], packed, None), together[5:12])


@pytest.mark.parametrize("math", ["fp32", "int8"])
@pytest.mark.parametrize("rows", [1, 13])
def test_every_wide_path_sums_alike(math, rows):
    """AVX2 and AVX-512 round alike and sum in one order: equal bits."""
    x = torch.randn(rows, 256)
    libraries = [emulation.library(name, math) for name in ("avx2", "avx512")]
    found = [operations.linear(each, x, nf4(each, (96, 256))[0], None) for each in libraries]
    assert torch.equal(*found)


def test_the_codes_values_are_bitsandbytes(library):
    """Sixteen rows of one code each, times the unit vectors: the sixteen values, to the bit."""
    codes = torch.arange(16, dtype=torch.uint8).repeat_interleave(32) * 17
    packed = operations.pack_nf4(library, codes, torch.ones(16), (16, 64))
    got = operations.linear(library, torch.eye(64), packed, None)
    assert torch.equal(got, bnb.get_4bit_type("nf4", device="cpu").expand(64, 16))


def test_activations_in_bfloat16_come_back_so(library):
    packed, _ = nf4(library, (64, 128))
    x = torch.randn(5, 128).bfloat16()
    got = operations.linear(library, x, packed, None)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, operations.linear(library, x.float(), packed, None).bfloat16())


def test_rows_that_do_not_lie_side_by_side(library):
    packed, weight = nf4(library, (64, 128))
    x = torch.randn(5, 256)[:, ::2]
    assert_near(operations.linear(library, x, packed, None), x, weight, None)


def test_packed_weights_take_no_more_than_their_codes_and_scales(library):
    packed, _ = nf4(library, (256, 2048))
    assert packed.data.numel() == 256 * 2048 // 2 + 256 * 2048 // 64 * 4
