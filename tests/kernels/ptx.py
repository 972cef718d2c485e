"""The few PTX instructions that our look-ups are made of, for the 32 lanes of a warp at once. Source: PTX ISA 8.7."""

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[np.uint32]  # [32]


def run(text: str, inputs: dict[str, Lanes]) -> dict[str, Lanes]:
    """Every register after the text has run; `inputs` names those it reads, `$4`. An unknown instruction raises."""
    registers = {"%laneid": np.arange(32, dtype=np.uint32), **inputs}
    for statement in text.strip().strip("{}").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        registers[target] = _OPERATIONS[name](*(_value(source, registers) for source in sources))
    return registers


def _value(source: str, registers: dict[str, Lanes]) -> Lanes:
    if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", source):
        return np.full(32, int(source, 0), np.uint32)
    return registers[source]


def _prmt(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """Nibble i of the selector picks byte i of the result from the eight of b and a; its top bit asks for the sign."""
    held = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros(32, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (held >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)).astype(
            np.uint32
        )
        signed = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), signed, byte) << np.uint32(8 * i)
    return result


def _lop3(a: Lanes, b: Lanes, c: Lanes, table: Lanes) -> Lanes:
    """Bit by bit, the place `abc` of a table of eight."""
    result = np.zeros(32, np.uint32)
    for place in range(8):
        if int(table[0]) >> place & 1:
            chosen = [value if place & bit else ~value for value, bit in ((a, 4), (b, 2), (c, 1))]
            result |= chosen[0] & chosen[1] & chosen[2]
    return result


def _shfl(value: Lanes, index: Lanes, clamp: Lanes, members: Lanes) -> Lanes:
    assert (clamp == 0x1F).all()
    assert (members == 0xFFFFFFFF).all()
    return value[index & np.uint32(31)]


_OPERATIONS: dict[str, Callable[..., Lanes]] = {
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
    "mov.u32": lambda a: a,
    "prmt.b32": _prmt,
    "selp.b32": lambda a, b, predicate: np.where(predicate, a, b),
    "setp.ne.u32": lambda a, b: a != b,
    "shfl.sync.idx.b32": _shfl,
    "shr.u32": lambda a, b: a >> b,
}
