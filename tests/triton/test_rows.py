"""Norms, gates, rotations and the write of keys and values against their twins."""

import pytest
import torch

from kernels import reference, rows
from tests.kernels.naive import relative_error

# numpy's word for exp(-x) of a large negative x, whose infinity is meant
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

GATE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("shape", [(3, 48), (1, 5, 100), (2, 3, 4, 16), (1100,)])
def test_a_norm(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    got = rows.rms_norm(x, weight.to(dtype), 1e-5)
    assert got.dtype is dtype
    assert relative_error(got, reference.rms_norm(x, weight.to(dtype), 1e-5).double()) <= GATE[dtype]


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_a_norm_of_small_and_large_rows(epsilon):
    x, weight = torch.randn(3, 24) * torch.tensor([[1e-4], [1.0], [1e4]]), torch.randn(24)
    got, want = rows.rms_norm(x, weight, epsilon), reference.rms_norm(x, weight, epsilon)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_heads_are_normed_where_they_lie():
    joined = torch.randn(1, 5, 100)
    heads = joined[..., 10:58].view(1, 5, 3, 16)
    weight = torch.randn(16)
    assert not heads.is_contiguous()
    assert torch.equal(rows.rms_norm(heads, weight, 1e-5), rows.rms_norm(heads.contiguous(), weight, 1e-5))


@pytest.mark.parametrize("dtype", GATE)
def test_a_norm_of_a_sum(dtype):
    x, residual, weight = torch.randn(3, 40).to(dtype), torch.randn(3, 40).to(dtype), torch.randn(40)
    got, total = rows.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(got, rows.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [7, 1030])
def test_a_gate(kind, width, dtype):
    joined = (3 * torch.randn(1, 3, 2 * width)).to(dtype)
    x, up = joined.split(width, -1)
    assert relative_error(rows.gate(kind, x, up), reference.gate(kind, x, up).double()) <= GATE[dtype]
    assert relative_error(rows.gate(kind, x), reference.gate(kind, x).double()) <= GATE[dtype]


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_a_gate_of_large_numbers(kind):
    x = torch.tensor([[-1e4, -90.0, -1e-6, 0.0, 90.0, 1e4, torch.inf]])
    torch.testing.assert_close(rows.gate(kind, x), reference.gate(kind, x), rtol=1e-5, atol=1e-12)


def heads_of(count, heads, width, dtype):
    """As a model gives them: a slice of joined rows, heads first, seen with rows first."""
    joined = torch.randn(count, heads * width + 6).to(dtype)
    return joined[:, 4:-2].view(count, heads, width).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("width", [8, 80])
def test_a_rotation(width, dtype):
    x, (cos, sin) = heads_of(3, 2, width, dtype), torch.randn(2, 3, width).to(dtype).unbind()
    got = rows.rotate(x, cos, sin)
    assert got.dtype is dtype
    assert relative_error(got, reference.rotate(x, cos, sin).double()) <= GATE[dtype]


@pytest.mark.parametrize("dtype", GATE)
def test_keys_and_values_are_written_to_their_places_alone(dtype):
    k, v = heads_of(4, 2, 9, dtype), heads_of(4, 2, 5, dtype)
    k[0, 0, 0], v[1, 1, 4] = torch.nan, torch.inf
    index = torch.tensor([19, 0, 5, 7])
    k_cache, v_cache = torch.full((20, 2, 9), 7.0, dtype=dtype), torch.full((20, 2, 5), 7.0, dtype=dtype)
    rows.write_kv(k_cache, v_cache, k, v, index, 3)
    for cache, given in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[index[:3]].nan_to_num(), given[:3].nan_to_num())
        rest = torch.ones(20, dtype=torch.bool)
        rest[index[:3]] = False
        assert cache[rest].eq(7).all()
    assert k_cache[19, 0, 0].isnan()


@pytest.mark.parametrize("dtype", GATE)
def test_rotating_and_writing_at_once_gives_the_same_bits(dtype):
    q, k, v = heads_of(3, 4, 16, dtype), heads_of(3, 2, 16, dtype), heads_of(3, 2, 12, dtype)
    cos, sin = torch.randn(2, 3, 16).to(dtype).unbind()
    index = torch.tensor([2, 9, 4])
    k_cache, v_cache = torch.full((10, 2, 16), 7.0, dtype=dtype), torch.full((10, 2, 12), 7.0, dtype=dtype)
    got = rows.rotate_and_write(k_cache, v_cache, q, k, v, cos, sin, index)
    assert torch.equal(got, rows.rotate(q, cos, sin))
    k_want, v_want = torch.full_like(k_cache, 7.0), torch.full_like(v_cache, 7.0)
    rows.write_kv(k_want, v_want, rows.rotate(k, cos, sin), v, index, 3)
    assert torch.equal(k_cache, k_want)
    assert torch.equal(v_cache, v_want)


def test_a_place_past_two_thousand_million_numbers(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = 2**31 // 64 + 1
    cache = torch.empty(far + 1, 1, 64, dtype=torch.bfloat16)  # no memory but for the place written
    k = torch.randn(1, 1, 64).bfloat16()
    rows.write_kv(
        cache, torch.empty(far + 1, 1, 1, dtype=torch.bfloat16), k, k[..., :1], torch.tensor([far]), 1
    )
    assert torch.equal(cache[far], k[0])
