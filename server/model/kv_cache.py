"""The tensors that keys and values live in. Which sequence owns which block is not known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.memory import zeros
from kernels.segments import KV_TILE
from server.model.attention import AttentionLayer

PADDING_BLOCK = 0  # never given to a sequence: rows that only pad a step write there


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer: `blocks` blocks of `block_size` positions, then a tile that only pads reads."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys, values: [positions, kv heads, width]
    blocks: int
    block_size: int

    @classmethod
    def allocate(
        cls,
        layers: Sequence[AttentionLayer],
        *,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        assert KV_TILE % block_size == 0, (
            f"block size {block_size} does not divide the tile of {KV_TILE} keys"
        )
        positions = blocks * block_size + KV_TILE

        def zeroed(heads: int, width: int) -> Tensor:
            return zeros((positions, heads, width), dtype, device)

        made = tuple((zeroed(la.kv_heads, la.k_width), zeroed(la.kv_heads, la.v_width)) for la in layers)
        return cls(made, blocks, block_size)


def position_nbytes(layers: Sequence[AttentionLayer], dtype: torch.dtype) -> int:
    """Bytes that one position takes over all layers."""
    return sum(la.kv_heads * (la.k_width + la.v_width) for la in layers) * dtype.itemsize
