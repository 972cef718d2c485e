"""What a model does row by row, on a GPU: norms, gates, rotations, and the write of keys and values.

Named and called like those of `kernels/cpu/operations.py`. Sums are made in float32 and rounded once; how a row is
shared among threads depends on its width alone, so that its bits are its own. Knows nothing of models.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels import portable
from kernels.cpu.operations import Activation

_TILE = 1024  # numbers of a program, where a row has fewer


@triton.jit(do_not_specialize=["rows", "inner"])
def _rms_norm_kernel(
    y: tl.tensor,
    total: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    epsilon: tl.tensor,
    rows: tl.tensor,
    inner: tl.tensor,  # rows lie at (row // inner) * outer_stride + (row % inner) * inner_stride
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    WIDTH: tl.constexpr,
    ROOM: tl.constexpr,
    HEIGHT: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    portable.wait_for_earlier(EARLY)
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    at = tl.arange(0, ROOM)
    mask = (row < rows)[:, None] & (at < WIDTH)[None, :]
    place = row[:, None].to(tl.int64) * WIDTH + at[None, :]
    start = (row // inner).to(tl.int64) * outer_stride + row % inner * inner_stride
    values = tl.load(x + start[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        rounded = portable.narrow(values, total.dtype.element_ty)
        tl.store(total + place, rounded, mask=mask)
        values = rounded.to(tl.float32)
    mean = tl.sum(values * values, 1) / WIDTH
    factor = tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    normed = values * tl.rsqrt(mean + epsilon)[:, None] * factor[None, :]
    tl.store(y + place, portable.narrow(normed, y.dtype.element_ty), mask=mask)


def rms_norm(
    x: Tensor,  # [..., width]
    weight: Tensor,  # [width], any dtype
    epsilon: float,
) -> Tensor:  # as x
    """`weight * x / sqrt(mean(x^2) + epsilon)` (Zhang and Sennrich 2019)."""
    y = x.new_empty(x.shape)
    _norm(y, None, x, None, weight, epsilon)
    return y


def add_rms_norm(
    x: Tensor,  # [..., width]
    residual: Tensor,  # the same shape and dtype
    weight: Tensor,  # [width], any dtype
    epsilon: float,
) -> tuple[Tensor, Tensor]:  # as x
    """The norm of `x + residual`, and that sum as it was rounded."""
    assert residual.shape == x.shape
    assert residual.dtype is x.dtype
    assert residual.is_contiguous()
    y, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _norm(y, total, x, residual, weight, epsilon)
    return y, total


def _norm(
    y: Tensor, total: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> None:
    width = x.shape[-1]
    assert weight.shape == (width,)
    grouped = _dense(x.reshape(-1, x.shape[-2] if x.dim() > 1 else 1, width))
    rows, room = x.numel() // width, triton.next_power_of_2(width)
    height = max(1, _TILE // room)
    _rms_norm_kernel[(triton.cdiv(rows, height),)](
        y,
        total,
        grouped,
        residual,
        weight,
        epsilon,
        rows,
        grouped.shape[1],
        *grouped.stride()[:2],
        WIDTH=width,
        ROOM=room,
        HEIGHT=height,
        num_warps=4 if room <= 4096 else 8,
        **portable.early(y),
    )


@triton.jit
def _gate_kernel(
    y: tl.tensor,
    x: tl.tensor,
    up: tl.tensor,
    x_stride: tl.tensor,  # of rows
    up_stride: tl.tensor,
    WIDTH: tl.constexpr,
    ROOM: tl.constexpr,
    KIND: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    portable.wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * ROOM + tl.arange(0, ROOM)
    mask = at < WIDTH
    value = tl.load(x + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    inner = value
    if KIND == "gelu_tanh":  # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) * (x + 0.044715 x^3)
        inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
    value = value / (1 + tl.exp(-inner))
    if up is not None:
        value *= tl.load(up + row * up_stride + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + at, portable.narrow(value, y.dtype.element_ty), mask=mask)


def gate(
    activation: Activation,
    x: Tensor,  # [..., width]
    up: Tensor | None = None,  # the same shape and dtype
) -> Tensor:  # as x
    """`activation(x) * up`, or the activation alone."""
    width = x.shape[-1]
    y, rows = x.new_empty(x.shape), _dense(x.reshape(-1, width))
    others = None if up is None else _dense(up.reshape(-1, width))
    assert others is None or (others.shape == rows.shape and others.dtype is rows.dtype)
    room = min(_TILE, triton.next_power_of_2(width))
    _gate_kernel[(len(rows), triton.cdiv(width, room))](
        y,
        rows,
        others,
        rows.stride(0),
        0 if others is None else others.stride(0),
        WIDTH=width,
        ROOM=room,
        KIND=activation,
        num_warps=4,
        **portable.early(y),
    )
    return y


@triton.jit
def _heads_kernel(
    y: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    kv_index: tl.tensor,
    q_row: tl.tensor,  # strides
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    Q_HEADS: tl.constexpr,  # of queries, turned into y; 0: none
    KV_HEADS: tl.constexpr,  # of keys, turned into the cache, and of values, copied there; 0: none
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    HALF_ROOM: tl.constexpr,
    V_ROOM: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    portable.wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if Q_HEADS > 0:  # noqa: SIM102 - decided when compiled: without queries their pointers are no tensors
        if head < Q_HEADS:
            source = q + row * q_row + head * q_head
            _turn(y + (row * Q_HEADS + head) * WIDTH, source, cos, sin, row, WIDTH, HALF_ROOM)
    if KV_HEADS > 0:  # noqa: SIM102
        if head >= Q_HEADS:
            position = tl.load(kv_index + row) * KV_HEADS + (head - Q_HEADS) % KV_HEADS
            if head < Q_HEADS + KV_HEADS:
                source = k + row * k_row + (head - Q_HEADS) * k_head
                _turn(k_cache + position * WIDTH, source, cos, sin, row, WIDTH, HALF_ROOM)
            else:
                at = tl.arange(0, V_ROOM)
                source = v + row * v_row + (head - Q_HEADS - KV_HEADS) * v_head
                value = tl.load(source + at, mask=at < V_WIDTH)
                tl.store(v_cache + position * V_WIDTH + at, value, mask=at < V_WIDTH)


@triton.jit
def _turn(
    target: tl.tensor,
    source: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    row: tl.tensor,
    WIDTH: tl.constexpr,
    HALF_ROOM: tl.constexpr,
) -> None:
    """A head's numbers from `source` to `target`, its halves turned by the row's angles, if there are any."""
    HALF: tl.constexpr = (WIDTH + 1) // 2
    low = tl.arange(0, HALF_ROOM)
    high = low + HALF
    first = tl.load(source + low, mask=low < HALF)
    second = tl.load(source + high, mask=high < WIDTH)
    if cos is not None:
        cos += row * WIDTH
        sin += row * WIDTH
        x, z = first.to(tl.float32), second.to(tl.float32)
        turned = x * tl.load(cos + low, mask=low < HALF).to(tl.float32)
        turned -= z * tl.load(sin + low, mask=low < HALF).to(tl.float32)
        other = z * tl.load(cos + high, mask=high < WIDTH).to(tl.float32)
        other += x * tl.load(sin + high, mask=high < WIDTH).to(tl.float32)
        first = portable.narrow(turned, target.dtype.element_ty)
        second = portable.narrow(other, target.dtype.element_ty)
    tl.store(target + low, first, mask=low < HALF)
    tl.store(target + high, second, mask=high < WIDTH)


def rotate(
    x: Tensor,  # [rows, heads, width]
    cos: Tensor,  # [rows, width]
    sin: Tensor,  # [rows, width]
) -> Tensor:  # [rows, heads, width] as x
    """`x * cos + rotate_half(x) * sin` (Su et al. 2021, RoPE)."""
    y = x.new_empty(x.shape)
    _launch(len(x), y=y, q=x, cos=cos, sin=sin)
    return y


def write_kv(
    k_cache: Tensor,  # [positions, kv heads, k width], written
    v_cache: Tensor,  # [positions, kv heads, v width], written
    k: Tensor,  # [rows or more, kv heads, k width], as k_cache
    v: Tensor,  # [rows or more, kv heads, v width], as v_cache
    kv_index: Tensor,  # [rows or more] int64
    rows: int,
) -> None:
    """`cache[kv_index[t]] = k[t]` and the same of v, for the first `rows` rows."""
    _launch(rows, k=k, v=v, k_cache=k_cache, v_cache=v_cache, kv_index=kv_index)


def rotate_and_write(
    k_cache: Tensor,  # [positions, kv heads, k width], written
    v_cache: Tensor,  # [positions, kv heads, v width], written
    q: Tensor,  # [rows, query heads, k width]
    k: Tensor,  # [rows, kv heads, k width], as k_cache
    v: Tensor,  # [rows, kv heads, v width], as v_cache
    cos: Tensor,  # [rows, k width]
    sin: Tensor,  # [rows, k width]
    kv_index: Tensor,  # [rows] int64
) -> Tensor:  # [rows, query heads, k width] as q
    """The queries turned, and the turned keys and the values written: `rotate` twice and `write_kv` in one launch."""
    y = q.new_empty(q.shape)
    _launch(len(q), y=y, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, cos=cos, sin=sin, kv_index=kv_index)
    return y


def _launch(
    rows: int,
    *,
    y: Tensor | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    kv_index: Tensor | None = None,
) -> None:
    q, k, v = (None if heads is None else _dense(heads) for heads in (q, k, v))
    q_heads, q_width = (0, 0) if q is None else q.shape[1:]
    kv_heads, k_width = (0, q_width) if k is None else k.shape[1:]
    v_width = 1 if v is None else v.shape[2]
    some = k if q is None else q
    assert some is not None, "neither queries nor keys"
    assert q is None or q_width == k_width
    assert cos is None or sin is None or cos.shape == sin.shape == (rows, k_width)
    for cache, heads in ((k_cache, k), (v_cache, v)):
        assert cache is None or heads is None or (cache.is_contiguous() and cache.dtype is heads.dtype)
    _heads_kernel[(rows, q_heads + 2 * kv_heads)](
        y,
        q,
        k,
        v,
        k_cache,
        v_cache,
        None if cos is None else cos.contiguous(),
        None if sin is None else sin.contiguous(),
        kv_index,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        WIDTH=k_width,
        V_WIDTH=v_width,
        HALF_ROOM=triton.next_power_of_2((k_width + 1) // 2),
        V_ROOM=triton.next_power_of_2(v_width),
        num_warps=1,
        **portable.early(some),
    )


def _strides(heads: Tensor | None) -> tuple[int, int]:
    return (0, 0) if heads is None else (heads.stride(0), heads.stride(1))


def _dense(
    x: Tensor,  # [..., width]
) -> Tensor:
    """The same numbers, those of a row side by side; rows may lie as they like."""
    return x if x.stride(-1) == 1 else x.contiguous()
