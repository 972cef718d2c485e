"""Tensors in, tensors out: the operations of the compiled library, named like their twins in `kernels/reference.py`.

Each runs on as many threads as torch would use on the calling thread. Knows nothing of modules or of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.cpu.library import Library

STRIP, BLOCK = 32, 64  # rows and columns that packed weights come in: packed.h
_BLOCK_BYTES = {"nf4": STRIP * BLOCK // 2 + STRIP * 4, "bf16": STRIP * BLOCK * 2}
_LARGE_PAGE = 2 << 20


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
    kind: Literal["nf4", "bf16"]
    shape: tuple[int, int]  # (out, in)

    @classmethod
    def empty(cls, library: Library, kind: Literal["nf4", "bf16"], shape: tuple[int, int]) -> PackedWeight:
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
    """bitsandbytes' NF4 codes and scales in the kernels' order; the values stay what they are."""
    assert shape[1] % BLOCK == 0
    assert codes.numel() * 2 == absmax.numel() * BLOCK == shape[0] * shape[1]
    assert (codes.dtype, absmax.dtype) == (torch.uint8, torch.float32)
    packed = PackedWeight.empty(library, "nf4", shape)
    codes, absmax = codes.contiguous(), absmax.contiguous()
    run(library, "pack_nf4", codes.data_ptr(), absmax.data_ptr(), packed.data.data_ptr(), *shape)
    return packed


def pack_bf16(
    library: Library,
    weight: Tensor,  # [out, in] bfloat16
) -> PackedWeight:
    """A bfloat16 matrix in the kernels' order."""
    assert weight.dtype is torch.bfloat16
    weight = weight.contiguous()
    packed = PackedWeight.empty(library, "bf16", (weight.shape[0], weight.shape[1]))
    run(library, "pack_bf16", weight.data_ptr(), packed.data.data_ptr(), *packed.shape)
    return packed


def linear(
    library: Library,
    x: Tensor,  # [rows, in]
    weight: PackedWeight,
    bias: Tensor | None,  # [out] float32
) -> Tensor:  # [rows, out]
    """`y = x @ weight.T + bias`, summed in float32; a row's bits do not depend on the rows beside it."""
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
