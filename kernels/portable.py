"""What differs between a GPU and Triton's interpreter, which runs the same kernels on the CPU in the tests.

The interpreter computes bfloat16 on its bit patterns, cuts bits off where it should round to it, and knows no
assembly. Kernels take products, rounding and look-ups from here and are otherwise the same in both places.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.runtime import driver

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)


def check_launches() -> None:
    """Raise what keeps Triton from launching kernels here: for that it compiles C, when it runs."""
    _ = driver.active


def early(x: Tensor) -> dict[str, bool]:
    """What to launch a kernel on `x` with that starts with `wait_for_earlier`.

    On Hopper and later it may be launched while the kernel before it on the stream still ends (programmatic dependent
    launch, CUDA's programming guide): 1 to 1.5 us less from one to the next, measured on an H200.
    """
    possible = _takes_early_launches(x.device)
    return {"EARLY": possible, "launch_pdl": possible}


@cache
def _takes_early_launches(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_earlier(EARLY: tl.constexpr) -> None:
    """Until all that was launched before has ended and can be seen. Nothing may be read or written before."""
    if EARLY:
        gdc_wait()


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """`acc + a @ b` in float32; float32 operands are multiplied exactly, not as tf32.

    The interpreter's product is numpy's, whose order of summing depends on a row's place in the tile, as a tensor
    core's does not: in float64, rounded once, that does not show.
    """
    if _INTERPRETED:
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return acc + product.to(tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_in_parts(a: tl.tensor, b: tl.tensor, acc: tl.tensor, PART: tl.constexpr) -> tl.tensor:
    """`dot`, adding up every `PART` of the inner dimension by itself and in order, as a tensor core does."""
    if _INTERPRETED:
        inner = tl.arange(0, a.shape[1])
        for part in tl.static_range(a.shape[1] // PART):
            mine = (inner // PART == part)[None, :]
            acc = dot(tl.where(mine, a, 0.0).to(a.dtype), b, acc)
        return acc
    else:
        return dot(a, b, acc)


@triton.jit
def narrow(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 to `dtype`, rounded to nearest, ties to even; NaN stays NaN."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value != value, 0x7FC00000, bits)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def look_up(
    packed: tl.tensor,
    code: tl.tensor,
    DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
) -> tl.tensor:
    """Bytes to the values of their high and of their low nibbles, as DTYPE.

    ASSEMBLY is a text of `kernels/lookup.py` for that dtype, or None: then `code` [16] float32 is gathered from,
    which is what the interpreter does always.
    """
    if _INTERPRETED or ASSEMBLY is None:
        values = narrow(tl.load(code + tl.arange(0, 16)), DTYPE)
        flat = packed.reshape(packed.numel).to(tl.int32)
        high = tl.gather(values, flat >> 4, 0).reshape(packed.shape)
        low = tl.gather(values, flat & 15, 0).reshape(packed.shape)
    else:
        high, low = tl.inline_asm_elementwise(
            ASSEMBLY, CONSTRAINTS, [packed], dtype=(DTYPE.value, DTYPE.value), is_pure=True, pack=4
        )
    return high, low
