"""Decoder layers that follow one another, run in one call where the model does nothing between them.

Knows no architecture by name: a list of layers is taken over when every one of them is run whole already and the model
then answers with the same bits on a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.model.compiled_layer import TRIAL_ROWS, trial_context
from server.model.context import forward_context
from server.model.steady import CompiledLayer, LayersInOneCall, LayerStack

if TYPE_CHECKING:
    from server.model.kernel_set import Kernels


def install_compiled_stacks(model: PreTrainedModel, kernels: Kernels) -> None:
    """Let the first of a list's layers run all, where the C kernels run each in one call and nothing changes by it."""
    lists = [
        (parent, name, layers)
        for parent in model.modules()
        for name, layers in parent.named_children()
        if isinstance(layers, nn.ModuleList) and len(layers) > 1
    ]
    for parent, name, layers in lists:
        forwards = [layer.__dict__.get("forward") for layer in layers]
        compiled = [each for each in forwards if isinstance(each, CompiledLayer)]
        runs = [each.run for each in compiled if isinstance(each.run, LayersInOneCall)]
        if len(runs) < len(layers):
            continue
        run = LayersInOneCall.of(runs[0].library, *(each.parts for each in compiled))
        if run is None:
            continue
        want = _answer(model, compiled, kernels)
        layers[0].forward = CompiledLayer(
            _in_turn([each.original for each in compiled]), compiled[0].parts, run
        )
        setattr(parent, name, LayerStack(layers))
        if not torch.equal(_answer(model, compiled, kernels), want):
            layers[0].forward = compiled[0]
            setattr(parent, name, layers)


def _in_turn(layers: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """Each layer's own forward on what the one before it gave."""

    def forward(hidden_states: Tensor, *args: Any, **others: Any) -> Any:
        for layer in layers:
            hidden_states = layer(hidden_states, *args, **others)
        return hidden_states

    return forward


@torch.inference_mode()
def _answer(model: PreTrainedModel, compiled: Sequence[CompiledLayer], kernels: Kernels) -> Tensor:
    """Logits of the first tokens of a sequence, base alone."""
    device, dtype = cast(torch.device, model.device), cast(torch.dtype, model.dtype)
    ids = torch.arange(TRIAL_ROWS, device=device)[None]
    with forward_context(trial_context([each.parts for each in compiled], kernels, device, dtype)):
        logits: Tensor = model(input_ids=ids, position_ids=ids, use_cache=False).logits
    return logits
