"""The sixteen values of NF4, and the PTX that looks four packed bytes up in them, two codes a byte.

Text and numbers only: knows nothing of tensors. Source of the values: Dettmers et al. 2023 (QLoRA), as bitsandbytes
stores them.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Literal

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

Lookup = Literal["shuffle", "permute", "mixed"]
Half = Literal["bfloat16", "float16"]

CONSTRAINTS = "=r,=r,=r,=r,r"  # four bytes in; the high nibbles' four values, then the low nibbles' four


def half_bits(value: float, half: Half) -> int:
    """A float32's bits as a 16-bit float, rounded to nearest, ties to even."""
    if half == "float16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@cache
def assembly(lookup: Lookup, half: Half) -> str:
    """PTX from `$4` (bytes 0 to 3) to `$0, $1` (their high nibbles' values) and `$2, $3` (their low nibbles').

    "shuffle" asks another lane for every value, "permute" picks its bytes from the table; "mixed" does half of the
    values each way, because on a GPU shuffles and permutes wait for different units. Instructions per weight of the
    product at 16 rows, on sm_90: 3.8, 5.0 and 4.6.
    """
    bits = [half_bits(value, half) for value in NF4_CODE]
    high = [_word(bits[i : i + 4], 8) for i in (0, 4, 8, 12)]
    low = [_word(bits[i : i + 4], 0) for i in (0, 4, 8, 12)]
    first, second = ("$0", "$2"), ("$1", "$3")
    match lookup:
        case "shuffle":
            lines = [*_own_value(high, low), *_ask(0, *first), *_ask(4, *second)]
        case "permute":
            lines = [*_selectors(), *_pick(0, high, low, *first), *_pick(4, high, low, *second)]
        case "mixed":
            lines = [*_own_value(high, low), *_ask(0, *first), *_selectors(), *_pick(4, high, low, *second)]
    return "{\n" + "\n".join(lines) + "\n}"


def _word(bits: list[int], shift: int) -> str:
    """Byte `shift / 8` of each of four values, the first one lowest."""
    return f"{sum((value >> shift & 0xFF) << 8 * place for place, value in enumerate(bits)):#010x}"


def _own_value(high: list[str], low: list[str]) -> list[str]:
    """Lane l holds value `l & 15`, made from its number: the assembler moves this out of loops.

    A shuffle reads the low five bits of an index and a nibble's neighbour sets the fifth, which is why lanes 16 to 31
    hold the values again.
    """
    return [
        ".reg .b32 part, lane, slot, upper, valueh, valuel, p, q, own, v<4>; .reg .pred far;",
        "mov.u32 lane, %laneid; and.b32 slot, lane, 7; and.b32 upper, lane, 8; setp.ne.u32 far, upper, 0;",
        f"prmt.b32 p, {high[0]}, {high[1]}, slot; prmt.b32 q, {high[2]}, {high[3]}, slot;",
        "selp.b32 valueh, q, p, far;",
        f"prmt.b32 p, {low[0]}, {low[1]}, slot; prmt.b32 q, {low[2]}, {low[3]}, slot;",
        "selp.b32 valuel, q, p, far;",
        "prmt.b32 own, valuel, valueh, 0x4040;",
    ]


def _ask(first: int, upper: str, lower: str) -> list[str]:
    """Four nibbles from `first` on: each asks the lane of its number for the value."""
    lines = []
    for i in range(4):
        lines.append(f"shr.u32 part, $4, {4 * (first + i)};")
        lines.append(f"shfl.sync.idx.b32 v{i}, own, part, 0x1f, 0xffffffff;")
    lines.append(f"prmt.b32 {upper}, v1, v3, 0x5410; prmt.b32 {lower}, v0, v2, 0x5410;")
    return lines


def _selectors() -> list[str]:
    """A permute picks four bytes of eight by the nibbles of a selector, whose top bits mean something else.

    So the codes' top bits are taken off, and choose between the halves of the table afterwards: nibble i takes byte i
    of one or of the other, `(top & 0x4444'4444) | 0x3210'3210`.
    """
    return [
        ".reg .b32 low3, top, l3, t, h0, h1, l0, l1, high, low;",
        "and.b32 low3, $4, 0x77777777; shr.u32 top, $4, 1;",
        "lop3.b32 top, top, 0x44444444, 0x32103210, 0xEA;",
    ]


def _pick(first: int, high: list[str], low: list[str], upper: str, lower: str) -> list[str]:
    """Four nibbles from `first` on at once: their values' high bytes, their low bytes, then both by parity."""
    return [
        f"shr.u32 l3, low3, {4 * first}; shr.u32 t, top, {4 * first};",
        f"prmt.b32 h0, {high[0]}, {high[1]}, l3; prmt.b32 h1, {high[2]}, {high[3]}, l3;",
        "prmt.b32 high, h0, h1, t;",
        f"prmt.b32 l0, {low[0]}, {low[1]}, l3; prmt.b32 l1, {low[2]}, {low[3]}, l3;",
        "prmt.b32 low, l0, l1, t;",
        f"prmt.b32 {upper}, low, high, 0x7351; prmt.b32 {lower}, low, high, 0x6240;",
    ]
