"""The base product of a group of sibling linears: one call gives all members' outputs side by side.

One class per way the weights are held. Each product of a row is the same bits whatever rows stand beside it, except
`ModuleLinear`, which is bitsandbytes' own path. Knows nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from kernels import reference


class BaseLinear(Protocol):
    """`y = x @ W.T + bias` for every member at once."""

    def __call__(
        self,
        x: Tensor,  # [rows, in]
    ) -> Tensor:  # [rows, sum of widths]
        ...


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """Weights in the compute dtype."""

    weight: Tensor  # [sum of widths, in]
    bias: Tensor | None

    @classmethod
    def of(cls, members: Sequence[nn.Linear]) -> DenseLinear:
        weight = torch.cat([member.weight.detach() for member in members])
        offset = 0
        for member in members:  # the modules keep views, so that the weights exist once
            member.weight = nn.Parameter(weight[offset : offset + member.out_features], requires_grad=False)
            offset += member.out_features
        return cls(weight, _joined_bias(members, weight.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return reference.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class FourBitWeight:
    """One linear's 4-bit codes as bitsandbytes stores them, with plain (single-quantized) absmax."""

    packed: Tensor  # uint8, two codes a byte
    absmax: Tensor  # [out * in / block] float32
    block: int
    kind: str  # "nf4" or "fp4"
    shape: tuple[int, int]  # (out, in)

    @classmethod
    def of(cls, module: Linear4bit) -> FourBitWeight:
        """Take codes and absmax; must happen before bitsandbytes' first forward, which repacks them in place."""
        state = module.weight.quant_state
        assert state is not None, "weights are not quantized yet"
        assert not getattr(state, "packing_format_for_cpu", False), "bitsandbytes has repacked these weights"
        absmax = state.absmax
        if state.nested:
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
        packed = module.weight.data.view(torch.uint8)
        out_features, in_features = state.shape
        return cls(packed, absmax.float(), state.blocksize, state.quant_type, (out_features, in_features))

    def dequantize(self, dtype: torch.dtype) -> Tensor:  # [out, in]
        dequantized: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, self.absmax, self.block, self.kind, self.shape, dtype
        )
        return dequantized


@dataclass(frozen=True, slots=True)
class FourBitLinear:
    """The exact product: dequantize, then one product for all members."""

    weights: tuple[FourBitWeight, ...]
    bias: Tensor | None

    @classmethod
    def of(cls, members: Sequence[Linear4bit], dtype: torch.dtype) -> FourBitLinear:
        return cls(tuple(FourBitWeight.of(member) for member in members), _joined_bias(members, dtype))

    def __call__(self, x: Tensor) -> Tensor:
        parts = [weight.dequantize(x.dtype) for weight in self.weights]
        return reference.linear(x, parts[0] if len(parts) == 1 else torch.cat(parts), self.bias)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """LLM.int8() weights with a scale per row; activations to int8 by row, no outlier columns."""

    weight: Tensor  # [sum of widths, in] int8
    absmax: Tensor  # [sum of widths] float32
    bias: Tensor | None

    @classmethod
    def of(cls, members: Sequence[Linear8bitLt], dtype: torch.dtype) -> Int8Linear:
        weight = torch.cat([member.weight.data for member in members])
        absmax = torch.cat([member.weight.SCB for member in members]).float()
        return cls(weight, absmax, _joined_bias(members, dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return reference.int8_linear(x, self.weight, self.absmax, self.bias)


@dataclass(frozen=True, slots=True)
class ModuleLinear:
    """The modules as they are: bitsandbytes' own kernels, one member after the other."""

    members: tuple[nn.Linear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        parts = [member(x) for member in self.members]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _joined_bias(members: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor | None:
    """The members' biases side by side, zeros where one has none; None when none has."""
    if all(member.bias is None for member in members):
        return None
    device = members[0].weight.device
    parts = [
        torch.zeros(member.out_features, device=device) if member.bias is None else member.bias.detach()
        for member in members
    ]
    return torch.cat([part.to(dtype) for part in parts])
