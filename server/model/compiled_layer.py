"""Which decoder layers a kernel set can run whole, and whether they then answer as before.

Knows no architecture by name: a layer is taken over whose parts are the usual ones and whose answers on a trial are
alike: the same bits by the C kernels, near in the dtype's own terms by kernels whose sums are not the modules'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.cpu.layer import AttentionShape
from kernels.plans import AttentionPlan, Heads
from kernels.segments import Span, Spans
from server.model.attention import AttentionLayer
from server.model.context import ForwardContext, StepPlans, forward_context
from server.model.linear import LoRALinear
from server.model.steady import CompiledLayer, CompiledMLP, CompiledRMSNorm, LayerParts

if TYPE_CHECKING:
    from server.model.kernel_set import Kernels

TRIAL_ROWS, _TRIAL_BLOCK = 3, 16
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def install_compiled_layers(
    model: PreTrainedModel, kernels: Kernels, attention: Sequence[AttentionLayer]
) -> None:
    """Let every layer that can be run so be run so. Linears and norms are in their places already."""
    assert kernels.layers is not None
    device, dtype = cast(torch.device, model.device), cast(torch.dtype, model.dtype)
    for layer in model.modules():
        parts = _usual_parts(layer, attention)
        run = None if parts is None else kernels.layers(parts)
        if parts is None or run is None:
            continue
        compiled = CompiledLayer(layer.forward, parts, run)
        if _answers_alike(compiled, kernels, device, dtype):
            layer.forward = compiled


def _usual_parts(layer: nn.Module, attention: Sequence[AttentionLayer]) -> LayerParts | None:
    """The layer's parts, if they are those of Llama's and no others."""
    parts = dict(layer.named_children())
    if set(parts) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return None
    attend, mlp = parts["self_attn"], parts["mlp"]
    norms = (parts["input_layernorm"], parts["post_attention_layernorm"])
    if not isinstance(mlp, CompiledMLP) or not all(isinstance(norm, CompiledRMSNorm) for norm in norms):
        return None
    linears = [*attend.children(), mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if tuple(name for name, _ in attend.named_children()) != _ATTENTION or not all(
        isinstance(linear, LoRALinear) for linear in linears
    ):
        return None
    q, k, v, o, gate, up, down = (cast(LoRALinear, linear) for linear in linears)
    together = ((q, k, v), (o,), (gate, up), (down,))
    for members in together:
        if [(m.group, m.member) for m in members] != [
            (members[0].group, i) for i in range(len(members[0].group.widths))
        ]:
            return None
    index = cast(int, attend.layer_idx)
    seen, scale = attention[index], getattr(attend, "scaling", None)
    if seen.k_width != seen.v_width or not seen.plain or not isinstance(scale, float):
        return None
    heads = q.out_features // seen.k_width
    return LayerParts(
        index,
        AttentionShape(heads, seen.kv_heads, seen.k_width, seen.window, scale),
        cast(tuple[CompiledRMSNorm, CompiledRMSNorm], norms),
        (q.group, o.group, gate.group, down.group),
        mlp.kind,
    )


@torch.inference_mode()
def _answers_alike(
    compiled: CompiledLayer, kernels: Kernels, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether the layer itself gives the same on rows of one sequence: the same bits, or by planned kernels a
    difference of no more length than the dtype's epsilon times the answer's."""
    seeded = torch.Generator().manual_seed(0)
    hidden, width = compiled.parts.sites[0].site.in_features, compiled.parts.shape.width
    x = torch.randn(1, TRIAL_ROWS, hidden, generator=seeded).to(device, dtype)
    cos, sin = torch.randn(2, 1, TRIAL_ROWS, width, generator=seeded).to(device, dtype).unbind()
    with forward_context(trial_context([compiled.parts], kernels, device, dtype)):
        try:
            want = compiled.original(x, position_embeddings=(cos, sin))
        except (TypeError, ValueError, RuntimeError):  # it is called in another way
            return False
        got = compiled(x, position_embeddings=(cos, sin))
    return isinstance(want, Tensor) and _alike(got, want, torch.finfo(dtype).eps if kernels.planned else 0.0)


def trial_context(
    layers: Sequence[LayerParts], kernels: Kernels, device: torch.device, dtype: torch.dtype
) -> ForwardContext:
    """A step of the first rows of one sequence through these layers, without adapters; layers of one shape."""
    shape, last = layers[0].shape, max(parts.index for parts in layers)
    cache = torch.zeros(2, _TRIAL_BLOCK, shape.kv_heads, shape.width, device=device, dtype=dtype).unbind()
    span = Span(0, TRIAL_ROWS, TRIAL_ROWS, (0,))
    return ForwardContext(
        kv_index=torch.arange(TRIAL_ROWS, device=device),
        spans=Spans((span,), _TRIAL_BLOCK, device),
        segments={},
        kv_caches=(cast(tuple[Tensor, Tensor], cache),) * (last + 1),
        kernels=kernels,
        plans=_plans(span, shape, device) if kernels.planned else None,
    )


def _alike(got: Tensor, want: Tensor, epsilon: float) -> bool:
    """Whether they differ by no more than `epsilon` times the length of `want`; with 0, not at all."""
    if got.shape != want.shape or got.dtype is not want.dtype:
        return False
    return bool((got.double() - want.double()).norm() <= epsilon * want.double().norm())


def _plans(span: Span, shape: AttentionShape, device: torch.device) -> StepPlans:
    """The tables of a step that is this span, without adapters."""
    heads = Heads(shape.heads // shape.kv_heads, shape.kv_heads)
    return StepPlans(AttentionPlan.of((span,), span.end, span.end, heads, _TRIAL_BLOCK, device), {})
