"""Modules whose result for a row does not depend on the rows beside it, in place of the model's own.

Rotary embeddings become tables: some types (dynamic, longrope) choose frequencies by the longest position of the whole
batch, so that a long neighbour changes another row's angles. Activations are composed of operations whose vector and
scalar paths round alike: torch computes SiLU and GELU with the one, and what is left over at the end of a thread's
share with the other. Compiled modules do in one call what a model's own do in many. Knows nothing of adapters' names.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from kernels.cpu import operations
from kernels.cpu.layer import AttentionShape, LayerCall, LayerCalls, SiteWeights, StepCall, run_layers
from kernels.cpu.library import Library
from kernels.cpu.operations import Activation
from server.model.context import ForwardContext, current_context
from server.model.linear import CompiledDeltas, LinearGroup, PackedLinear


class Gate(Protocol):
    """`activation(x) * up`, or the activation alone."""

    def __call__(self, activation: Activation, x: Tensor, up: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class RowOperations:
    """Row by row: kernels that take the place of a model's own where they give the same."""

    dtypes: frozenset[torch.dtype]  # that they take
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]  # x [..., width], weight, epsilon
    gate: Gate
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]  # x [rows, heads, width], cos and sin [rows, width]
    same_bits: bool  # whether gates and rotations must have those of a model's own to take their place


class RotaryTable(nn.Module):
    """The original module's output at every position up to `length`, looked up by position."""

    def __init__(self, original: nn.Module, length: int) -> None:
        super().__init__()
        self.original = original
        self.config = getattr(original, "config", None)  # Granite asks it for its base
        self.length = length
        self._tables: dict[object, Tensor | tuple[Tensor, ...]] = {}

    def forward(
        self,
        x: Tensor,  # [1, rows, hidden]; only its dtype and device matter
        position_ids: Tensor,  # [1, rows], or [3, 1, rows] where images have a place in three directions
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        if position_ids.dim() == 3:  # in which a text goes on alike
            position_ids = position_ids[0]
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
    for parent, name, child in _children(model):
        if "Rotary" in type(child).__name__ and not isinstance(parent, RotaryTable):
            setattr(parent, name, RotaryTable(child, length))
            replaced += 1
    return replaced


class SteadySiLU(nn.Module):
    """`x / (1 + exp(-x))`."""

    kind: Activation = "silu"

    def __init__(self, rows: RowOperations | None = None) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            return self.rows.gate(self.kind, x)
        return x / (1 + torch.exp(-x))


class SteadyGELUTanh(nn.Module):
    """`x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`."""

    kind: Activation = "gelu_tanh"

    def __init__(self, rows: RowOperations | None = None) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            return self.rows.gate(self.kind, x)
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1 + torch.tanh(inner))


class SteadyGELU(nn.Module):
    """`x / 2 * (1 + erf(x / sqrt(2)))`."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def install_steady_activations(model: nn.Module, rows: RowOperations | None = None) -> None:
    """Replace the activations above wherever the model has them; others stay as they are."""
    steady: dict[type, Callable[[], nn.Module]] = {
        type(ACT2FN["silu"]): lambda: SteadySiLU(rows),
        nn.SiLU: lambda: SteadySiLU(rows),
        type(ACT2FN["gelu_pytorch_tanh"]): lambda: SteadyGELUTanh(rows),
        type(ACT2FN["gelu_new"]): lambda: SteadyGELUTanh(rows),
        type(ACT2FN["gelu"]): SteadyGELU,
    }
    for parent, name, child in _children(model):
        if type(child) in steady:
            setattr(parent, name, steady[type(child)]())


class CompiledRMSNorm(nn.Module):
    """A norm by the root mean square, in one call."""

    def __init__(self, rows: RowOperations, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.rows, self.epsilon = rows, epsilon
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows.rms_norm(x, self.weight, self.epsilon)


class CompiledMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`, the middle in one call; its linears keep the names that adapters know."""

    def __init__(self, rows: RowOperations, original: nn.Module) -> None:
        super().__init__()
        self.rows = rows
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = map(original.get_submodule, _MLP)

    @property
    def kind(self) -> Activation:
        return cast(SteadySiLU | SteadyGELUTanh, self.act_fn).kind

    def forward(self, x: Tensor) -> Tensor:
        inner = self.rows.gate(self.kind, self.gate_proj(x), self.up_proj(x))
        return cast(Tensor, self.down_proj(inner))


_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")


def install_compiled_rows(model: nn.Module, rows: RowOperations) -> None:
    """Replace norms and gated MLPs by compiled ones where these give what the model's own give, tried on numbers."""
    for parent, name, child in _children(model):
        if "RMSNorm" in type(child).__name__:
            norm = _compiled_norm(child, rows)
            if norm is not None:
                setattr(parent, name, norm)
        elif {key for key, _ in child.named_children()} == set(_MLP) and _is_gated_mlp(child, rows):
            setattr(parent, name, CompiledMLP(rows, child))


def install_compiled_rotation(model: nn.Module, rows: RowOperations) -> None:
    """Turn queries and keys in one call, within a forward pass of ours, if the model's own function does just that.

    transformers' attention calls a function of its modeling module, so that is where ours takes its place; it hands
    whatever is not ours to the original.
    """
    modeling = sys.modules[type(model).__module__]
    original = getattr(modeling, "apply_rotary_pos_emb", None)
    if (
        original is None
        or hasattr(original, "original")
        or not _turns_halves(original, rows, cast(torch.device, model.device))
    ):
        return

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        context = current_context()
        running = context.kernels.rows if context and context.kernels else None
        if (
            running is None
            or args
            or kwargs
            or not (q.dtype is k.dtype is cos.dtype and q.dtype in running.dtypes)
            or not (q.shape[0] == cos.shape[0] == 1 and q.shape[-1] == k.shape[-1] == cos.shape[-1])
        ):
            return cast(tuple[Tensor, Tensor], original(q, k, cos, sin, *args, **kwargs))
        return (
            running.rotate(q[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None],
            running.rotate(k[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None],
        )

    apply_rotary_pos_emb.original = original  # type: ignore[attr-defined]
    modeling.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]


def _turns_halves(function: Callable[..., Any], rows: RowOperations, device: torch.device) -> bool:
    """Whether it gives the same as ours on heads of [1, heads, rows, width]."""
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    seeded = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=seeded).to(device) for heads in (3, 2))
    cos, sin = torch.randn(2, 1, 5, 8, generator=seeded).to(device).unbind()
    try:
        turned = function(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # it asks for other shapes
        return False
    ours = [rows.rotate(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None] for x in (q, k)]
    alike = torch.equal if rows.same_bits else _near
    return isinstance(turned, tuple) and all(map(alike, turned, ours))


def _near(ours: Tensor, theirs: Tensor) -> bool:
    """Within what one rounding more or less makes of float32."""
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]


def _compiled_norm(original: nn.Module, rows: RowOperations) -> CompiledRMSNorm | None:
    """The norm's twin, with its weight or (Gemma) one more than it; None where neither is what the norm does."""
    weight = getattr(original, "weight", None)
    epsilon = getattr(original, "variance_epsilon", getattr(original, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if len(inspect.signature(original.forward).parameters) != 1:
        return None
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=seeded) * torch.tensor([[1e-3], [0.1], [1.0], [30.0]])
    x = x.to(weight.device)
    with torch.no_grad():
        want = original(x)
        for factor in (weight.detach(), 1 + weight.detach()):
            twin = CompiledRMSNorm(rows, factor.float(), epsilon)
            if _near(twin(x), want):
                return twin
    return None


def _is_gated_mlp(original: nn.Module, rows: RowOperations) -> bool:
    """Whether it does nothing but gate: run with linears that answer known numbers."""
    activation = original.get_submodule("act_fn")
    if not isinstance(activation, SteadySiLU | SteadyGELUTanh):
        return False
    seeded = torch.Generator().manual_seed(0)
    device = next(original.parameters()).device
    gate, up = torch.randn(2, 3, 16, generator=seeded).to(device).unbind()
    trial = copy.copy(original)
    stand_ins = {
        "gate_proj": _Answer(gate),
        "up_proj": _Answer(up),
        "down_proj": nn.Identity(),
        "act_fn": activation,
    }
    trial.__dict__["_modules"] = stand_ins
    with torch.no_grad():
        answer, ours = trial(torch.zeros(3, 16, device=device)), rows.gate(activation.kind, gate, up)
    return torch.equal(answer, ours) if rows.same_bits else _near(answer, ours)


class _Answer(nn.Module):
    """Answers the same whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _: Tensor) -> Tensor:
        return self.answer


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """What a decoder layer of the usual parts is made of: `x += attention(norm(x))`, `x += mlp(norm(x))`."""

    index: int
    shape: AttentionShape
    norms: tuple[CompiledRMSNorm, CompiledRMSNorm]  # before attention, before the MLP
    sites: tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup]  # q k v, o, gate up, down
    activation: Activation


class RunsLayer(Protocol):
    """All that such a layer, or several, does in a step."""

    def __call__(
        self,
        context: ForwardContext,
        x: Tensor,  # [1, rows, hidden]
        angles: tuple[Tensor, Tensor],  # cos, sin: [1, rows, width]
    ) -> Tensor:  # [1, rows, hidden]
        ...


@dataclass(frozen=True, slots=True, eq=False)
class CompiledLayer:
    """A decoder layer's forward in place of transformers', which makes a hundred calls of Python's; outside a forward
    pass of ours the layer's own runs."""

    original: Callable[..., Any]
    parts: LayerParts
    run: RunsLayer

    def __call__(
        self,
        hidden_states: Tensor,  # [1, rows, hidden]
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,  # cos, sin: [1, rows, width]
        **others: Any,
    ) -> Any:
        context = current_context()
        if (
            context is None
            or position_embeddings is None
            or position_embeddings[0].shape[2] != self.parts.shape.width
        ):
            return self.original(hidden_states, *args, position_embeddings=position_embeddings, **others)
        return self.run(context, hidden_states, position_embeddings)


class LayerStack(nn.ModuleList):
    """Layers of which the first runs all. Who goes through them finds it alone, who asks for modules all of them."""

    def __iter__(self) -> Iterator[nn.Module]:
        yield self[0]

    def __getitem__(self, index: Any) -> Any:
        return (self[0],) if isinstance(index, slice) else super().__getitem__(index)


@dataclass(slots=True, eq=False)
class LayersInOneCall:
    """One layer, or several in turn, in one call of the C kernels.

    A layer's weights pass through the caches and leave nothing of the interpreter there: with one row, what ran
    between the products took a quarter of a step.
    """

    library: Library
    layers: Sequence[LayerParts]
    _calls: LayerCalls | None = None
    _called_with: tuple[object, ...] = ()

    @classmethod
    def of(cls, library: Library, *layers: LayerParts) -> Self | None:
        """None where the products are not these kernels', or a step is not the same for all layers."""
        ours = all(isinstance(site.base, PackedLinear) for parts in layers for site in parts.sites)
        alike = len({_in_a_step(parts) for parts in layers}) == 1
        return cls(library, layers) if ours and alike else None

    def __call__(self, context: ForwardContext, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        calls = self._call_into(context)
        step = context.compiled_steps.get(angles)
        if step is None:
            step = context.compiled_steps[angles] = self._step(calls.each[0], context, angles)
        return run_layers(self.library, calls, step, x)

    def _call_into(self, context: ForwardContext) -> LayerCalls:
        """The layers' addresses, found again when they are given another cache or another pool."""
        caches = [context.kv_caches[parts.index] for parts in self.layers]
        given = (*chain(*caches), *(site.deltas for parts in self.layers for site in parts.sites))
        if self._calls is None or not all(map(operator.is_, given, self._called_with)):
            block_size = context.spans.block_size
            self._calls = LayerCalls.of(
                _call(parts, cache, block_size) for parts, cache in zip(self.layers, caches, strict=True)
            )
            self._called_with = given
        return self._calls

    def _step(self, layer: LayerCall, context: ForwardContext, angles: tuple[Tensor, Tensor]) -> StepCall:
        sites = self.layers[0].sites
        return StepCall.of(
            layer,
            sites[0].site.in_features,
            angles[0][0],
            angles[1][0],
            context.kv_index,
            context.spans,
            [
                context.flat_segments(site.site.group) if context.segments.get(site.site.group) else None
                for site in sites
            ],
        )


def _in_a_step(parts: LayerParts) -> tuple[object, ...]:
    """What of a layer a step's rows, rooms and segments depend on."""
    shape = parts.shape
    widths = [(site.site.group, site.site.in_features, *site.widths) for site in parts.sites]
    return (shape.heads, shape.kv_heads, shape.width, *widths)


def _call(parts: LayerParts, caches: tuple[Tensor, Tensor], block_size: int) -> LayerCall:
    bases = [cast(PackedLinear, site.base) for site in parts.sites]
    return LayerCall.of(
        [
            SiteWeights(base.weight, base.bias, _pages(site))
            for base, site in zip(bases, parts.sites, strict=True)
        ],
        (
            (parts.norms[0].weight, parts.norms[0].epsilon),
            (parts.norms[1].weight, parts.norms[1].epsilon),
        ),
        caches,
        block_size,
        parts.shape,
        parts.activation,
    )


def _pages(site: LinearGroup) -> operations.Deltas | None:
    return None if site.deltas is None else cast(CompiledDeltas, site.deltas).deltas
