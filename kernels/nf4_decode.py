"""An NF4 weight: its bytes as bitsandbytes stores them, and all of it as a matrix of floats. Knows no products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.lookup import NF4_CODE
from kernels.portable import look_up, narrow
from kernels.tiles import BLOCK

_ROWS, _BLOCKS = 32, 4  # of a program: 32 x 256 weights


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """One matrix as bitsandbytes stores it, with its absmax decoded and transposed.

    Double-quantized absmax is decoded at load: streaming the nested form would save 8 % of a step's bytes, but costs
    two dependent loads per block and column, and every joined member has an offset of its own.
    """

    packed: Tensor  # [out * in / 2] uint8, row after row; a byte's high nibble is the even k
    absmax_t: Tensor  # [in / 64, out] float32: those of a tile's columns lie side by side
    code: Tensor  # [16] float32
    shape: tuple[int, int]  # (out, in)

    @classmethod
    def of(
        cls,
        packed: Tensor,  # out * in / 2 bytes in any shape and dtype
        absmax: Tensor,  # [out * in / 64] float32
        shape: tuple[int, int],  # (out, in)
    ) -> NF4Weight:
        """Siblings are joined by rows: give their bytes, and their absmax, one after the other."""
        out, width = shape
        if width % BLOCK:
            raise ValueError(f"a row of {width} inputs is no multiple of {BLOCK}: blocks would straddle rows")
        if packed.nbytes != out * width // 2 or absmax.numel() != out * width // BLOCK:
            raise ValueError(
                f"a weight of {out} x {width} has {out * width // 2} bytes and {out * width // BLOCK} absmax, "
                f"given {packed.nbytes} and {absmax.numel()}"
            )
        absmax_t = absmax.float().view(out, width // BLOCK).t().contiguous()
        code = torch.tensor(NF4_CODE, dtype=torch.float32, device=packed.device)
        return cls(packed.flatten().view(torch.uint8), absmax_t, code, shape)


def dequantize(
    weight: NF4Weight,
    dtype: torch.dtype,
) -> Tensor:  # [out, in]
    """`w[n, k] = code[nibble[n, k]] * absmax[n, k // 64]` in float32, rounded once, as bitsandbytes does."""
    return dequantize_into(torch.empty(weight.shape, dtype=dtype, device=weight.packed.device), weight)


def dequantize_into(
    dense: Tensor,  # [out, in] written
    weight: NF4Weight,
) -> Tensor:  # dense
    """`dequantize` into a matrix that is there already; its dtype is the result's."""
    out, width = weight.shape
    grid = (-(-out // _ROWS), -(-width // (BLOCK * _BLOCKS)))
    _dequantize_kernel[grid](
        weight.packed,
        weight.absmax_t,
        weight.code,
        dense,
        out,
        width // 2,
        ROWS=_ROWS,
        BLOCKS=_BLOCKS,
        num_warps=4,
    )
    return dense


@triton.jit
def _dequantize_kernel(
    packed: tl.tensor,
    absmax_t: tl.tensor,
    code: tl.tensor,
    dense: tl.tensor,
    out: tl.tensor,
    row_bytes: tl.tensor,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.minimum(row, out - 1).to(tl.int64)
    byte = tl.arange(0, 32)
    k = tl.arange(0, 64)
    first = tl.program_id(1) * BLOCKS
    for block in range(first, tl.minimum(first + BLOCKS, row_bytes // 32)):
        codes = tl.load(packed + place[:, None] * row_bytes + block * 32 + byte[None, :])
        scale = tl.load(absmax_t + block * out + place)
        high, low = look_up(codes, code, tl.float32, None, None)
        values = tl.interleave(high, low) * scale[:, None]
        there = dense + place[:, None] * (row_bytes * 2) + block * 64 + k[None, :]
        tl.store(there, narrow(values, dense.dtype.element_ty), mask=(row < out)[:, None])
