"""Where a kernel meets a module: the base product of sibling linears plus the deltas of every adapter in the step.

A `LoRALinear` stands in the model where a linear stood. Siblings that read the same input (q, k, v; gate, up) form one
`LinearGroup`: the first of them to be called computes all. One base class per way the weights are held; each product of
a row is the same bits whatever rows stand beside it, except `ModuleLinear`, which is bitsandbytes' own path. Knows
nothing of how pages came to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from adapters.adapter import Site
from adapters.page_copy import SitePages
from kernels import reference
from kernels.cpu import operations
from kernels.cpu.library import Library
from server.model.context import ForwardContext, current_context


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
        weight = joined([member.weight.detach() for member in members])
        offset = 0
        for member in members:  # the modules keep views, so that the weights exist once
            member.weight = nn.Parameter(weight[offset : offset + member.out_features], requires_grad=False)
            offset += member.out_features
        return cls(weight, joined_bias(members, weight.dtype))

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

    @classmethod
    def of_siblings(cls, members: Sequence[nn.Linear]) -> FourBitWeight:
        """All members' as one matrix, row after row."""
        weights = [cls.of(cast(Linear4bit, member)) for member in members]
        return replace(
            weights[0],
            packed=joined([weight.packed.flatten() for weight in weights]),
            absmax=joined([weight.absmax.flatten() for weight in weights]),
            shape=(sum(weight.shape[0] for weight in weights), weights[0].shape[1]),
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:  # [out, in]
        dequantized: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, self.absmax, self.block, self.kind, self.shape, dtype
        )
        return dequantized


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The exact product by the compiled kernels, which read the members' weights as one matrix in their own order.

    The members' weights are let go with the members, so that they exist once.
    """

    library: Library
    weight: operations.PackedWeight
    bias: Tensor | None

    @staticmethod
    def serves(members: Sequence[nn.Linear]) -> bool:
        """Whether there is a kernel for these: plain weights, and NF4 in blocks of 64 that do not straddle rows."""
        return all(type(member) is nn.Linear or in_nf4_blocks(member, operations.BLOCK) for member in members)

    @classmethod
    def of(cls, members: Sequence[nn.Linear], library: Library) -> PackedLinear:
        if isinstance(members[0], Linear4bit):
            weight = FourBitWeight.of_siblings(members)
            packed = operations.pack_nf4(library, weight.packed, weight.absmax, weight.shape)
        else:
            packed = operations.pack_plain(library, joined([member.weight.detach() for member in members]))
        return cls(library, packed, joined_bias(members, torch.float32))

    def __call__(self, x: Tensor) -> Tensor:
        return operations.linear(self.library, x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class FourBitLinear:
    """The exact product in plain PyTorch: dequantize, then one product for all members, of any number of rows."""

    weights: tuple[FourBitWeight, ...]
    bias: Tensor | None

    @classmethod
    def of(cls, members: Sequence[Linear4bit], dtype: torch.dtype) -> FourBitLinear:
        return cls(tuple(FourBitWeight.of(member) for member in members), joined_bias(members, dtype))

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
        return cls(weight, absmax, joined_bias(members, dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return reference.int8_linear(x, self.weight, self.absmax, self.bias)


@dataclass(frozen=True, slots=True)
class ModuleLinear:
    """The modules as they are: bitsandbytes' own kernels, one member after the other."""

    members: tuple[nn.Linear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        parts = [member(x) for member in self.members]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


NOT_OURS = (DenseLinear, FourBitLinear, Int8Linear, ModuleLinear)  # products by PyTorch or bitsandbytes


def in_nf4_blocks(member: nn.Linear, block: int) -> bool:
    """Whether its weights are NF4 in blocks of that many, which do not straddle rows."""
    return (
        isinstance(member, Linear4bit)
        and member.weight.quant_state.quant_type == "nf4"
        and member.weight.quant_state.blocksize == block
        and member.in_features % block == 0
    )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts one after the other; a single one without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def joined_bias(members: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor | None:
    """The members' biases side by side, zeros where one has none; None when none has."""
    if all(member.bias is None for member in members):
        return None
    device = members[0].weight.device
    parts = [
        torch.zeros(member.out_features, device=device) if member.bias is None else member.bias.detach()
        for member in members
    ]
    return torch.cat([part.to(dtype) for part in parts])


def exact_linear(members: Sequence[nn.Linear], dtype: torch.dtype) -> BaseLinear:
    """The exact product in plain PyTorch, of whatever kind the members' weights are; `dtype` is what x will have."""
    if isinstance(members[0], Linear4bit):
        return FourBitLinear.of(cast(Sequence[Linear4bit], members), dtype)
    if isinstance(members[0], Linear8bitLt):
        return Int8Linear.of(cast(Sequence[Linear8bitLt], members), dtype)
    return DenseLinear.of(members)


class Deltas(Protocol):
    """`base(x)` with the deltas of every segment of the running step added: `y += expand(shrink(x))`."""

    def product(
        self,
        base: BaseLinear,
        x: Tensor,  # [rows, in]
        group: str,
        context: ForwardContext,
    ) -> Tensor:  # [rows, sum of widths]
        ...


@dataclass(frozen=True, slots=True)
class PlainDeltas:
    """Segment by segment, in plain PyTorch."""

    pages: SitePages
    widths: tuple[int, ...]  # of the members

    def product(self, base: BaseLinear, x: Tensor, group: str, context: ForwardContext) -> Tensor:
        y = base(x)
        for segment in context.segments.get(group, ()):
            v = reference.shrink(x, self.pages.a, self.pages.scale, segment)
            reference.expand(y, v, self.pages.b, self.widths, segment)
        return y


@dataclass(frozen=True, slots=True)
class CompiledDeltas:
    """All segments in one call of the CPU's kernels, which are for float32."""

    deltas: operations.Deltas
    plain: PlainDeltas

    @classmethod
    def of(cls, library: Library, pages: SitePages, widths: tuple[int, ...]) -> CompiledDeltas:
        deltas = operations.Deltas.of(library, pages.a, pages.b, pages.scale, widths)
        return cls(deltas, PlainDeltas(pages, widths))

    def product(self, base: BaseLinear, x: Tensor, group: str, context: ForwardContext) -> Tensor:
        if x.dtype is not torch.float32:
            return self.plain.product(base, x, group, context)
        y = base(x)
        if context.segments.get(group):
            self.deltas.add(y, x, context.flat_segments(group))
        return y


@dataclass(slots=True, eq=False)
class LinearGroup:
    """Sibling linears of one site: one product for all, adapters included."""

    site: Site
    base: BaseLinear
    deltas: Deltas | None = None  # set once, when the pool is made
    _input: Tensor | None = field(default=None, repr=False)
    _outputs: tuple[Tensor, ...] = field(default=(), repr=False)
    widths: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.widths = tuple(member.out_features for member in self.site.members)

    def output(self, x: Tensor, member: int) -> Tensor:
        """One member's output; all members are computed when `x` is first seen, and let go after the last."""
        if self._input is not x:
            y = self.product(x.reshape(-1, x.shape[-1]))
            y = y.view(*x.shape[:-1], y.shape[-1])
            self._input = x
            self._outputs = torch.split_with_sizes(y, self.widths, -1) if len(self.widths) > 1 else (y,)
        result = self._outputs[member]
        if member == len(self._outputs) - 1:
            self._input, self._outputs = None, ()
        return result

    def product(
        self,
        x: Tensor,  # [rows, in]
    ) -> Tensor:  # [rows, sum of widths]
        """All members at once, with the deltas of the running step."""
        context = current_context()
        if context is None or self.deltas is None:
            return self.base(x)
        assert len(x) == len(context.kv_index), (
            f"{self.site.group} is given {len(x)} rows of a step of another size"
        )
        return self.deltas.product(self.base, x, self.site.group, context)


class Unadapted(nn.Module):
    """Stands for a linear that no adapter changes: the output embedding, or one that reads some of a step's rows."""

    def __init__(self, base: BaseLinear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        rows = self.base(x.reshape(-1, x.shape[-1]))
        return rows.view(*x.shape[:-1], rows.shape[-1])


class LoRALinear(nn.Module):
    """Stands for one linear of the base; its output is that member's share of the group's."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.group = group
        self.member = member
        self.in_features = group.site.in_features
        self.out_features = group.widths[member]

    def forward(self, x: Tensor) -> Tensor:
        return self.group.output(x, self.member)

    def extra_repr(self) -> str:
        return f"{self.group.site.members[self.member].module}, {self.in_features} -> {self.out_features}"
