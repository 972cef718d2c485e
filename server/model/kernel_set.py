"""Who computes a step: plain PyTorch, the CPU's compiled kernels, or Triton's on a GPU. Chosen once, at start.

A record of functions, so that a layer calls what it was given and asks nothing. Knows nothing of how steps are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from adapters.page_copy import SitePages
from kernels.cpu import operations
from kernels.cpu.library import Library
from kernels.reference import ROW_TILE
from server.model.attention import Attend, compiled_attention, plain_attention
from server.model.linear import BaseLinear, CompiledDeltas, Deltas, PackedLinear, PlainDeltas
from server.model.steady import LayerParts, LayersInOneCall, RowOperations, RunsLayer


class TakesLinears(Protocol):
    """The product of x in `dtype` with some sibling linears, or None where these kernels have none for them."""

    def __call__(self, members: Sequence[nn.Linear], dtype: torch.dtype) -> BaseLinear | None: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of a step."""

    name: str | None  # as a person reads it; None is plain PyTorch
    row_tile: int  # an eager step is padded to a multiple of so many rows
    attend: Attend
    deltas: Callable[[SitePages, tuple[int, ...]], Deltas]
    linear: TakesLinears
    head: TakesLinears  # the same of the output embedding
    rows: RowOperations | None = None  # norms, gates and rotations, where they have them
    planned: bool = False  # whether they read a step from tables on the device
    layers: Callable[[LayerParts], RunsLayer | None] | None = None  # a whole decoder layer of the usual parts


def _none(members: Sequence[nn.Linear], dtype: torch.dtype) -> BaseLinear | None:
    return None


def plain() -> Kernels:
    """PyTorch's own products: they sum in another order for one row than for sixteen, so that rows are padded."""
    return Kernels(None, ROW_TILE, plain_attention, PlainDeltas, _none, _none)


def compiled(library: Library) -> Kernels:
    """The C kernels, which have one order for any number of rows."""
    packed = partial(_packed, library)
    return Kernels(
        f"{library.instruction_set}, {library.math}",
        1,
        partial(compiled_attention, library),
        partial(CompiledDeltas.of, library),
        packed,
        packed,
        RowOperations(
            frozenset({torch.float32}),
            partial(operations.rms_norm, library),
            partial(operations.gate, library),
            partial(operations.rotate, library),
            same_bits=True,
        ),
        layers=partial(LayersInOneCall.of, library),
    )


def _packed(library: Library, members: Sequence[nn.Linear], dtype: torch.dtype) -> BaseLinear | None:
    return PackedLinear.of(members, library) if PackedLinear.serves(members) else None
