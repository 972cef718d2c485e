"""The compiled library: where it lies, what its functions take, which instruction set they run.

Knows nothing of tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal

InstructionSet = Literal["portable", "avx2", "avx512"]
Math = Literal["fp32", "int8"]  # of products; int8: as fast as the processor can, and not exact
# in the order of cpu.h's numbers
INSTRUCTION_SETS: tuple[InstructionSet, ...] = ("portable", "avx2", "avx512")

_INT, _SIZE, _POINTER, _FLOAT = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float

# After the instruction set and the threads, which every one of them takes first.
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "threads": (),
    "ask_large_pages": (_POINTER, _SIZE),
    "pack_nf4": (_POINTER, _POINTER, _POINTER, _SIZE, _SIZE),
    "pack_int8": (_POINTER, _POINTER, _POINTER, _SIZE, _SIZE),
    "pack_bf16": (_POINTER, _POINTER, _SIZE, _SIZE),
    "pack_bf16_dot": (_POINTER, _POINTER, _SIZE, _SIZE),
    "pack_f32": (_POINTER, _POINTER, _SIZE, _SIZE),
    "nf4_linear": (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE),
    "int8_linear": (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE),
    "has_int8": (),
    "bf16_linear": (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE),
    "bf16_dot_linear": (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE),
    "has_bf16_dot": (),
    "f32_linear": (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE),
    "add_deltas": (*(_POINTER,) * 5, *(_SIZE,) * 4, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER),
    "attention": (
        *(_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER),
        *(_SIZE,) * 6,
        *(_POINTER, _SIZE, _POINTER, _FLOAT, _SIZE, _FLOAT, _POINTER),
    ),
    "write_kv": (
        *(_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER),
        *(_SIZE,) * 5,
    ),
    "rms_norm": (_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT),
    "gate": (_POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE),
    "layers": (_POINTER, _SIZE, _POINTER, _POINTER, _POINTER),
    "rotate": (_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE),
}


@dataclass(frozen=True, slots=True)
class Library:
    """Its functions by name (without `loraplex_`), the instruction set and the arithmetic that they are to run."""

    functions: dict[str, Callable[..., int]]
    isa: int
    math: Math = "fp32"

    @property
    def instruction_set(self) -> InstructionSet:
        return INSTRUCTION_SETS[self.isa]


def library_path() -> Path | None:
    """The built library beside this file; None where the install found no compiler."""
    here = Path(__file__).parent
    found = [here / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((path for path in found if path.is_file()), None)


def load(instruction_set: InstructionSet | None = None, math: Math = "fp32") -> Library | None:
    """The library for this instruction set, or for the best the processor has; None where it was not built.

    Raises `ValueError` for what this processor lacks. torch is imported before the library is opened,
    so that both run on torch's OpenMP: two of them in one process fight over the cores.
    """
    import torch  # noqa: F401

    path = library_path()
    if path is None:
        return None
    opened = ctypes.CDLL(str(path))
    best = int(opened.loraplex_best_isa())
    isa = best if instruction_set is None else INSTRUCTION_SETS.index(instruction_set)
    if isa > best:
        raise ValueError(
            f"this processor has no {instruction_set}: the best it has is {INSTRUCTION_SETS[best]}"
        )
    library = Library({name: _declared(opened, name) for name in _ARGUMENTS}, isa, math)
    slow = library.instruction_set == "portable" and instruction_set is None
    if math == "int8" and (slow or not library.functions["has_int8"](isa, 1)):
        raise ValueError("this processor has no dot product of bytes (AVX-512 VNNI or AVX-VNNI)")
    return library


def _declared(opened: ctypes.CDLL, name: str) -> Callable[..., int]:
    function = opened[f"loraplex_{name}"]
    function.argtypes = [_INT, _INT, *_ARGUMENTS[name]]
    function.restype = _INT
    return function
