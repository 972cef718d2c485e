"""Triton's kernels as the model's layers call them on a GPU. Imported where the model runs on one, and nowhere else.

All share one work space and are launched on one stream. Which rows read which pages and blocks lies in the plans of
the running step. Knows nothing of how plans are made or steps are captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.page_copy import SitePages
from kernels import attention as paged
from kernels import lora, nf4, rows
from kernels.lora import Deltas
from kernels.nf4_decode import NF4Weight
from kernels.tiles import BLOCK, FIXED_ROWS
from kernels.workspace import Workspace
from server.model.context import ForwardContext, StepPlans
from server.model.kernel_set import Kernels, plain
from server.model.linear import (
    BaseLinear,
    DenseLinear,
    FourBitWeight,
    exact_linear,
    in_nf4_blocks,
    joined,
    joined_bias,
)
from server.model.steady import LayerParts, RowOperations

_FLOATS = frozenset({torch.bfloat16, torch.float32})


def cuda_kernels(device: torch.device, *, fixed: bool) -> Kernels:
    """The set; with `fixed` a row's bits do not depend on the rows beside it."""
    workspace = Workspace(device)
    return replace(
        plain(),
        name="batch-invariant Triton kernels" if fixed else "Triton kernels",
        row_tile=1,
        attend=partial(_attend, workspace, fixed),
        deltas=partial(TritonDeltas, workspace, fixed),
        linear=partial(_linear, workspace, fixed),
        head=partial(_head, fixed),
        rows=RowOperations(_FLOATS, rows.rms_norm, rows.gate, rows.rotate, same_bits=False),
        planned=True,
        layers=partial(TritonLayer, workspace, fixed),
    )


@dataclass(frozen=True, slots=True)
class TritonLinear:
    """The product with NF4 weights, read as bitsandbytes stores them; the members' own are let go."""

    workspace: Workspace
    fixed: bool
    weight: NF4Weight
    bias: Tensor | None

    @staticmethod
    def serves(members: Sequence[nn.Linear]) -> bool:
        """Whether there is a kernel for these: NF4 in blocks of 64 that do not straddle rows."""
        return all(in_nf4_blocks(member, BLOCK) for member in members)

    @classmethod
    def of(
        cls, workspace: Workspace, fixed: bool, members: Sequence[nn.Linear], dtype: torch.dtype
    ) -> TritonLinear:
        held = FourBitWeight.of_siblings(members)
        weight = NF4Weight.of(held.packed, held.absmax, held.shape)
        return cls(workspace, fixed, weight, joined_bias(members, dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return nf4.linear(x.contiguous(), self.weight, self.bias, self.workspace, fixed=self.fixed)

    def with_deltas(self, x: Tensor, deltas: Deltas) -> Tensor:
        """The product and the deltas, rounded once; of few rows by one launch."""
        return nf4.linear(x, self.weight, self.bias, self.workspace, fixed=self.fixed, deltas=deltas)


@dataclass(frozen=True, slots=True)
class TritonDeltas:
    """All segments at once: within the product where that is NF4's and rows are few, by launches of their own else."""

    workspace: Workspace
    fixed: bool
    pages: SitePages
    widths: tuple[int, ...]  # of the members

    def product(self, base: BaseLinear, x: Tensor, group: str, context: ForwardContext) -> Tensor:
        plan = _plans(context).deltas.get(group)
        if plan is None:
            return base(x)
        pages, x = self.pages, x.contiguous()
        deltas = Deltas(pages.a, pages.b, pages.scale, self.widths, plan)
        if (
            isinstance(base, TritonLinear)
            and pages.a.dtype is x.dtype
            and nf4.folds(len(x), fixed=self.fixed)
        ):
            return base.with_deltas(x, deltas)
        y = base(x).contiguous()
        lora.add_deltas(y, x.to(pages.a.dtype), deltas, self.workspace, fixed=self.fixed)
        return y


@dataclass(frozen=True, slots=True)
class FixedRows:
    """Any product made of the same number of rows at a time, so that cuBLAS sums in one order."""

    base: BaseLinear

    def __call__(self, x: Tensor) -> Tensor:
        parts = [
            self.base(F.pad(part, (0, 0, 0, FIXED_ROWS - len(part))))[: len(part)]
            for part in x.split(FIXED_ROWS)
        ]
        return joined(parts)


@dataclass(frozen=True, slots=True)
class TritonLayer:
    """A decoder layer as one function: nothing of transformers' between the launches, and fewer of them."""

    workspace: Workspace
    fixed: bool
    parts: LayerParts

    def __call__(self, context: ForwardContext, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        qkv, out, gate_up, down = self.parts.sites
        before, after = self.parts.norms
        residual = x[0].contiguous()
        heads = qkv.product(rows.rms_norm(residual, before.weight, before.epsilon))
        attended = out.product(self._attend(context, heads, angles).flatten(1))
        normed, residual = rows.add_rms_norm(attended, residual, after.weight, after.epsilon)
        gate, up = gate_up.product(normed).split_with_sizes(gate_up.widths, 1)
        return (residual + down.product(rows.gate(self.parts.activation, gate, up)))[None]

    def _attend(
        self,
        context: ForwardContext,
        heads: Tensor,  # [rows, (query heads + 2 * kv heads) * width]
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:  # [rows, query heads, width]
        shape, (k_cache, v_cache) = self.parts.shape, context.kv_caches[self.parts.index]
        q, k, v = heads.unflatten(1, (-1, shape.width)).split_with_sizes(
            (shape.heads, shape.kv_heads, shape.kv_heads), 1
        )
        cos, sin = (angle[0] for angle in angles)
        return paged.attention(
            rows.rotate_and_write(k_cache, v_cache, q, k, v, cos, sin, context.kv_index),
            k_cache,
            v_cache,
            _plans(context).attention,
            self.workspace,
            scale=shape.scale,
            window=shape.window,
            softcap=None,
            sinks=None,
            fixed=self.fixed,
        )


def _linear(
    workspace: Workspace, fixed: bool, members: Sequence[nn.Linear], dtype: torch.dtype
) -> BaseLinear | None:
    if TritonLinear.serves(members):
        return TritonLinear.of(workspace, fixed, members, dtype)
    return FixedRows(exact_linear(members, dtype)) if fixed else None


def _head(fixed: bool, members: Sequence[nn.Linear], dtype: torch.dtype) -> BaseLinear | None:
    return FixedRows(DenseLinear.of(members)) if fixed else None


def _attend(
    workspace: Workspace,
    fixed: bool,
    context: ForwardContext,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    k_cache, v_cache = context.kv_caches[layer]
    rows.write_kv(k_cache, v_cache, k, v, context.kv_index, len(k))
    return paged.attention(
        q,
        k_cache,
        v_cache,
        _plans(context).attention,
        workspace,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        fixed=fixed,
    )


def _plans(context: ForwardContext) -> StepPlans:
    assert context.plans is not None, "a step for a GPU's kernels came without its plans"
    return context.plans
