"""Tensors in, tensors out: the operations of the compiled library, named like their twins in `kernels/reference.py`.

Each runs on as many threads as torch would use on the calling thread. Knows nothing of modules or of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.library import Library
from kernels.segments import FlatSegments, Spans

STRIP, BLOCK = 64, 64  # rows and columns that packed weights come in: packed.h
# int8: NF4 codes that are multiplied in 8-bit integers; bf16_dot: bfloat16, by rows rounded to it
Kind = Literal["nf4", "int8", "bf16", "f32", "bf16_dot"]
_BLOCK_BYTES: dict[Kind, int] = {
    "nf4": STRIP * BLOCK // 2 + STRIP * 4,
    "int8": STRIP * BLOCK // 2 + STRIP * 4,
    "bf16": STRIP * BLOCK * 2,
    "f32": STRIP * BLOCK * 4,
    "bf16_dot": STRIP * BLOCK * 2,
}
_LARGE_PAGE = 2 << 20
_PAGE_RANK = 16  # rank rows of an adapter's page: lora.c


def threads(library: Library) -> int:
    """How many threads an operation gets: torch's own number, unless the system gives fewer."""
    return run(library, "threads")


def run(library: Library, name: str, *arguments: int | float) -> int:
    """Call one function; raises `MemoryError` where it found no memory for its work space."""
    result = library.functions[name](library.isa, torch.get_num_threads(), *arguments)
    if result < 0:
        raise MemoryError(f"the CPU kernel {name} found no memory for its work space")
    return result


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One matrix of weights in the order in which the library's kernels read it."""

    data: Tensor  # uint8
    kind: Kind
    shape: tuple[int, int]  # (out, in)

    @classmethod
    def empty(cls, library: Library, kind: Kind, shape: tuple[int, int]) -> PackedWeight:
        """Room for the matrix, on large pages where the system has them."""
        size = -(-shape[0] // STRIP) * -(-shape[1] // BLOCK) * _BLOCK_BYTES[kind]
        held = torch.empty(size + _LARGE_PAGE, dtype=torch.uint8)  # what lies past the end is never touched
        data = held[-held.data_ptr() % _LARGE_PAGE :][:size]
        run(library, "ask_large_pages", data.data_ptr(), size)
        return cls(data, kind, shape)


def pack_nf4(
    library: Library,
    codes: Tensor,  # [out * in / 2] uint8, high nibble first
    absmax: Tensor,  # [out * in / 64] float32
    shape: tuple[int, int],  # (out, in), in a multiple of 64: a block of codes lies in one row
) -> PackedWeight:
    """bitsandbytes' NF4 codes and scales in the order of the kernels of the library's arithmetic."""
    assert shape[1] % BLOCK == 0
    assert codes.numel() * 2 == absmax.numel() * BLOCK == shape[0] * shape[1]
    assert (codes.dtype, absmax.dtype) == (torch.uint8, torch.float32)
    kind: Kind = "int8" if library.math == "int8" else "nf4"
    packed = PackedWeight.empty(library, kind, shape)
    codes, absmax = codes.contiguous(), absmax.contiguous()
    run(library, f"pack_{kind}", codes.data_ptr(), absmax.data_ptr(), packed.data.data_ptr(), *shape)
    return packed


def pack_plain(
    library: Library,
    weight: Tensor,  # [out, in] float32 or bfloat16
) -> PackedWeight:
    """A plain matrix in the kernels' order: in bfloat16 if every value is one, so that half the bytes are read.

    In int8 arithmetic rows are rounded to bfloat16 for such a matrix, where the processor has a dot product of it.
    """
    halves = weight.bfloat16()
    kind: Kind = "f32"
    if torch.equal(halves.to(weight.dtype), weight):
        kind = "bf16_dot" if library.math == "int8" and run(library, "has_bf16_dot") else "bf16"
    weight = (weight if kind == "f32" else halves).contiguous()
    packed = PackedWeight.empty(library, kind, (weight.shape[0], weight.shape[1]))
    run(library, f"pack_{kind}", weight.data_ptr(), packed.data.data_ptr(), *packed.shape)
    return packed


def linear(
    library: Library,
    x: Tensor,  # [rows, in]
    weight: PackedWeight,
    bias: Tensor | None,  # [out] float32
) -> Tensor:  # [rows, out]
    """`y = x @ weight.T + bias`; a row's bits do not depend on the rows beside it.

    Summed in float32; for a weight of kind int8 as `reference.nf4_int8_linear` has it, of kind bf16_dot with x rounded
    to bfloat16.
    """
    rows = x.float().contiguous()
    out, inside = weight.shape
    assert rows.shape[1] == inside
    assert bias is None or (bias.dtype is torch.float32 and bias.is_contiguous() and len(bias) == out)
    y = torch.empty(len(rows), out)
    run(
        library,
        f"{weight.kind}_linear",
        rows.data_ptr(),
        weight.data.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        len(rows),
        out,
        inside,
    )
    return y.to(x.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Deltas:
    """The deltas of one site's pages: what `reference.shrink` and `expand` do segment by segment, in one call."""

    library: Library
    pages: tuple[Tensor, Tensor, Tensor, NDArray[np.int64]]  # held, so that their addresses are theirs
    addresses: tuple[int, int, int]  # of a, b and scale
    shape: tuple[int, ...]  # bfloat16 or not, width in and out, members, the address of their widths

    @classmethod
    def of(
        cls,
        library: Library,
        a: Tensor,  # [pages, members, 16, in] float32 or bfloat16
        b: Tensor,  # [pages, 16, sum of widths], as a
        scale: Tensor,  # [pages, members] float32
        widths: tuple[int, ...],  # one per member
    ) -> Deltas:
        assert a.dtype is b.dtype
        assert a.dtype in (torch.float32, torch.bfloat16)
        assert scale.dtype is torch.float32
        assert a.shape[2] == b.shape[1] == _PAGE_RANK
        assert (a.shape[:2], b.shape[2]) == (scale.shape, sum(widths))
        assert all(tensor.is_contiguous() and not tensor.is_cuda for tensor in (a, b, scale))
        each = np.array(widths, np.int64)
        shape = (int(a.dtype is torch.bfloat16), a.shape[3], b.shape[2], len(widths), each.ctypes.data)
        return cls(library, (a, b, scale, each), (a.data_ptr(), b.data_ptr(), scale.data_ptr()), shape)

    def add(
        self,
        y: Tensor,  # [rows, sum of widths] float32, written
        x: Tensor,  # [rows, in]
        segments: FlatSegments,
    ) -> None:
        """`y[t, m] += weight * scale * x[t] @ a[page, m].T @ b[page, :, m]`, summed over the segment's pages."""
        x = x.float().contiguous()
        assert y.dtype is torch.float32
        assert y.is_contiguous()
        assert x.shape[0] == y.shape[0]
        assert (x.shape[1], y.shape[1]) == self.shape[1:3]
        run(
            self.library,
            "add_deltas",
            y.data_ptr(),
            x.data_ptr(),
            *self.addresses,
            *self.shape,
            *segments.addresses,
        )


def write_kv(
    library: Library,
    k_cache: Tensor,  # [positions, kv heads, k width] float32 or bfloat16, written
    v_cache: Tensor,  # [positions, kv heads, v width], as k_cache
    k: Tensor,  # [rows or more, kv heads, k width] float32
    v: Tensor,  # [rows or more, kv heads, v width] float32
    kv_index: Tensor,  # [rows or more] int64
    rows: int,
) -> None:
    """`cache[kv_index[t]] = k[t]` and the same of v, for the first `rows` rows."""
    k, v = _with_dense_heads(k), _with_dense_heads(v)
    assert kv_index.dtype is torch.int64
    run(
        library,
        "write_kv",
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k.data_ptr(),
        *k.stride()[:2],
        v.data_ptr(),
        *v.stride()[:2],
        kv_index.data_ptr(),
        rows,
        *k_cache.shape[1:],
        v_cache.shape[2],
        k_cache.dtype is torch.bfloat16,
    )


def attention(
    library: Library,
    q: Tensor,  # [rows, query heads, k width] float32
    k_cache: Tensor,  # [positions, kv heads, k width] float32 or bfloat16
    v_cache: Tensor,  # [positions, kv heads, v width], as k_cache
    spans: Spans,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,  # [query heads]
) -> Tensor:  # [rows, query heads, v width]
    """Causal attention of every span over its own blocks; rows of no span come back as zeros."""
    q = _with_dense_heads(q)
    assert k_cache.dtype is v_cache.dtype
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    out = torch.empty(*q.shape[:2], v_cache.shape[2])
    out[spans.rows :].zero_()
    if not spans.rows:
        return out
    sinks = None if sinks is None else sinks.float().contiguous()
    run(
        library,
        "attention",
        out.data_ptr(),
        q.data_ptr(),
        *q.stride()[:2],
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k_cache.dtype is torch.bfloat16,
        q.shape[1],
        *k_cache.shape[1:],
        v_cache.shape[2],
        spans.block_size,
        *spans.flat().addresses,
        scale,
        window or 0,
        softcap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
    )
    return out


def _with_dense_heads(
    rows: Tensor,  # [rows, heads, width] float32
) -> Tensor:
    """The same rows, each head's numbers side by side; rows and heads may lie as they like."""
    assert rows.dtype is torch.float32
    return rows if rows.stride(2) == 1 else rows.contiguous()


def rms_norm(
    library: Library,
    x: Tensor,  # [..., width] float32
    weight: Tensor,  # [width] float32
    epsilon: float,
) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + epsilon)` (Zhang and Sennrich 2019)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    assert weight.shape == (width,)
    assert (x.dtype, weight.dtype) == (torch.float32, torch.float32)
    run(
        library, "rms_norm", y.data_ptr(), x.data_ptr(), weight.data_ptr(), x.numel() // width, width, epsilon
    )
    return y


Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")  # in the order of rows.c's numbers


def gate(
    library: Library,
    activation: Activation,
    x: Tensor,  # [..., width] float32
    up: Tensor | None = None,  # the same shape
) -> Tensor:
    """`activation(x) * up`, or the activation alone: of elements whose bits do not depend on where they lie."""
    width = x.shape[-1]
    y = torch.empty(x.shape)
    rows = _as_rows(x)
    others = None if up is None else _as_rows(up)
    assert others is None or others.shape == rows.shape
    run(
        library,
        "gate",
        y.data_ptr(),
        rows.data_ptr(),
        rows.stride(0),
        0 if others is None else others.data_ptr(),
        0 if others is None else others.stride(0),
        rows.shape[0],
        width,
        ACTIVATIONS.index(activation),
    )
    return y


def _as_rows(
    x: Tensor,  # [..., width] float32
) -> Tensor:  # [rows, width]
    """A view with each row's numbers side by side, a copy where there is none."""
    assert x.dtype is torch.float32
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def rotate(
    library: Library,
    x: Tensor,  # [rows, heads, width] float32
    cos: Tensor,  # [rows, width] float32
    sin: Tensor,  # [rows, width] float32
) -> Tensor:  # [rows, heads, width]
    """`x * cos + rotate_half(x) * sin`, the same bits as plain PyTorch's (Su et al. 2021, RoPE)."""
    x, cos, sin = _with_dense_heads(x), cos.contiguous(), sin.contiguous()
    rows, heads, width = x.shape
    assert cos.shape == sin.shape == (rows, width)
    assert cos.dtype is sin.dtype is torch.float32
    y = torch.empty(rows, heads, width)
    run(
        library,
        "rotate",
        y.data_ptr(),
        x.data_ptr(),
        *x.stride()[:2],
        cos.data_ptr(),
        sin.data_ptr(),
        rows,
        heads,
        width,
    )
    return y
