"""Rotary embeddings as tables, computed once from the model's own module.

Some types (dynamic, longrope) choose frequencies by the longest position of the whole batch, so that a long neighbour
changes another row's angles; a table indexed by position cannot. Knows nothing of attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
