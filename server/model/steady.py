"""Modules whose result for a row does not depend on the rows beside it, in place of the model's own.

Rotary embeddings become tables: some types (dynamic, longrope) choose frequencies by the longest position of the whole
batch, so that a long neighbour changes another row's angles. Activations are composed of operations whose vector and
scalar paths round alike: torch computes SiLU and GELU with the one, and what is left over at the end of a thread's
share with the other. Knows nothing of attention or adapters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class RotaryTable(nn.Module):
    """The original module's output at every position up to `length`, looked up by position."""

    def __init__(self, original: nn.Module, length: int) -> None:
        super().__init__()
        self.original = original
        self.length = length
        self._tables: dict[object, Tensor | tuple[Tensor, ...]] = {}

    def forward(
        self,
        x: Tensor,  # [1, rows, hidden]; only its dtype and device matter
        position_ids: Tensor,  # [1, rows]
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        key = (x.dtype, x.device, args, tuple(sorted(kwargs.items())))
        if key not in self._tables:
            positions = torch.arange(self.length, device=x.device)[None]
            made = self.original(x[:1, :1], positions, *args, **kwargs)
            self._tables[key] = tuple(part[0] for part in made) if isinstance(made, tuple) else made[0]
        table = self._tables[key]
        if isinstance(table, tuple):
            return tuple(part[position_ids] for part in table)
        return table[position_ids]


def install_rotary_tables(model: nn.Module, length: int) -> int:
    """Replace every rotary module; returns how many there were."""
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "Rotary" in type(child).__name__ and not isinstance(parent, RotaryTable):
                setattr(parent, name, RotaryTable(child, length))
                replaced += 1
    return replaced


class SteadySiLU(nn.Module):
    """`x / (1 + exp(-x))`."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))


class SteadyGELUTanh(nn.Module):
    """`x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1 + torch.tanh(inner))


class SteadyGELU(nn.Module):
    """`x / 2 * (1 + erf(x / sqrt(2)))`."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def install_steady_activations(model: nn.Module) -> None:
    """Replace the activations above wherever the model has them; others stay as they are."""
    steady = {
        type(ACT2FN["silu"]): SteadySiLU,
        nn.SiLU: SteadySiLU,
        type(ACT2FN["gelu_pytorch_tanh"]): SteadyGELUTanh,
        type(ACT2FN["gelu_new"]): SteadyGELUTanh,
        type(ACT2FN["gelu"]): SteadyGELU,
    }
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in steady:
                setattr(parent, name, steady[type(child)]())
