"""Which decoder layers can be run in one call of the compiled library, and whether they then answer as before.

Knows no architecture by name: a layer is taken over whose parts are the usual ones and whose answers on a trial are the
same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from kernels.cpu.layer import AttentionShape
from kernels.cpu.library import Library
from kernels.segments import Span, Spans
from server.model.attention import AttentionLayer
from server.model.context import ForwardContext, forward_context
from server.model.linear import LoRALinear, PackedLinear
from server.model.steady import CompiledLayer, CompiledMLP, CompiledRMSNorm

if TYPE_CHECKING:
    from server.model.kernel_set import Kernels

_TRIAL_ROWS = 3
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def install_compiled_layers(model: nn.Module, kernels: Kernels, attention: Sequence[AttentionLayer]) -> int:
    """Let every layer that can be run so be run so; returns how many. Linears and norms are in their places already."""
    library, replaced = kernels.library, 0
    assert library is not None
    for layer in model.modules():
        compiled = _compiled(layer, library, attention)
        if compiled is not None and _answers_alike(compiled, kernels):
            layer.forward = compiled
            replaced += 1
    return replaced


def _compiled(
    layer: nn.Module, library: Library, attention: Sequence[AttentionLayer]
) -> CompiledLayer | None:
    """The layer's twin, if it is made of the parts that one has."""
    parts = dict(layer.named_children())
    if set(parts) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return None
    attend, mlp = parts["self_attn"], parts["mlp"]
    norms = (parts["input_layernorm"], parts["post_attention_layernorm"])
    if not isinstance(mlp, CompiledMLP) or not all(isinstance(norm, CompiledRMSNorm) for norm in norms):
        return None
    linears = [*attend.children(), mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if tuple(name for name, _ in attend.named_children()) != _ATTENTION or not all(
        isinstance(linear, LoRALinear) and isinstance(linear.group.base, PackedLinear) for linear in linears
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
    if seen.k_width != seen.v_width or not isinstance(scale, float):
        return None
    heads = q.out_features // seen.k_width
    return CompiledLayer(
        library,
        layer.forward,
        index,
        AttentionShape(heads, seen.kv_heads, seen.k_width, seen.window, scale),
        cast(tuple[CompiledRMSNorm, CompiledRMSNorm], norms),
        (q.group, o.group, gate.group, down.group),
        mlp.kind,
    )


@torch.inference_mode()
def _answers_alike(compiled: CompiledLayer, kernels: Kernels) -> bool:
    """Whether the layer itself gives the same bits, on rows of one sequence."""
    seeded = torch.Generator().manual_seed(0)
    shape, rows = compiled.shape, _TRIAL_ROWS
    x = torch.randn(1, rows, compiled.sites[0].site.in_features, generator=seeded)
    cos, sin = torch.randn(2, 1, rows, shape.width, generator=seeded).unbind()
    cache = torch.zeros(2, rows, shape.kv_heads, shape.width).unbind()
    context = ForwardContext(
        kv_index=torch.arange(rows),
        spans=Spans((Span(0, rows, rows, (0,)),), rows, torch.device("cpu")),
        segments={},
        kv_caches=(cast(tuple[Tensor, Tensor], cache),) * (compiled.index + 1),
        kernels=kernels,
    )
    with forward_context(context):
        try:
            want = compiled.original(x, position_embeddings=(cos, sin))
        except (TypeError, ValueError, RuntimeError):  # it is called in another way
            return False
        got = compiled(x, position_embeddings=(cos, sin))
    return isinstance(want, Tensor) and torch.equal(got, want)
