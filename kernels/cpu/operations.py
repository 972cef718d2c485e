"""Tensors in, tensors out: the operations of the compiled library, named like their twins in `kernels/reference.py`.

Each runs on as many threads as torch would use on the calling thread. Knows nothing of modules or of steps.
"""

from __future__ import annotations

import torch

from kernels.cpu.library import Library


def threads(library: Library) -> int:
    """How many threads an operation gets: torch's own number, unless the system gives fewer."""
    return run(library, "threads")


def run(library: Library, name: str, *arguments: int | float) -> int:
    """Call one function; raises `MemoryError` where it found no memory for its work space."""
    result = library.functions[name](library.isa, torch.get_num_threads(), *arguments)
    if result < 0:
        raise MemoryError(f"the CPU kernel {name} found no memory for its work space")
    return result
