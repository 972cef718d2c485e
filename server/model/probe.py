"""What a transformers model does in one forward pass, learnt by running it on three tokens.

The probe sees every attention call (the shapes the cache needs, and models that bypass the attention interface) and
which linears read the same input (siblings). Linears are stood in for while it runs: bitsandbytes repacks weights in
place at its first forward, and a large model would take its time. Knows nothing of adapters' files or of the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.adapter import Layout, Member, Site
from server.errors import UnsupportedModelError
from server.model.attention import AttentionLayer, probing

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Probed:
    """The sites where a base can be adapted, and what each layer's attention needs."""

    layout: Layout
    attention: tuple[AttentionLayer, ...]


def refuse_unserved_config(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for what a configuration already tells."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYER_TYPES)
    if getattr(config, "attention_chunk_size", None) and "llama4" in config.model_type:
        other = sorted({*other, "chunked_attention"})
    if getattr(config, "max_position_embeddings", None) is None:
        raise UnsupportedModelError(
            f"{name} cannot be served: its configuration does not say how long a text may be "
            "(max_position_embeddings)"
        )
    if other:
        raise UnsupportedModelError(
            f"{name} cannot be served: it has layers of type {', '.join(other)}; "
            "only full and sliding-window attention are served"
        )


def probe(model: PreTrainedModel) -> Probed:
    """Run three tokens through the model; raises `UnsupportedModelError` naming the architecture and the reason."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    ids = torch.arange(3, device=model.device)[None] + 3
    with _stand_ins(model) as calls, probing() as layers, torch.inference_mode():
        try:
            model(
                input_ids=ids,
                position_ids=ids - 3,
                use_cache=False,
                logits_to_keep=torch.tensor([2], device=model.device),
            )
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} cannot be served: a forward pass over flattened tokens fails: {error}"
            ) from error
    if sorted(layers) != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            f"{name} cannot be served: paged attention saw {len(layers)} of {config.num_hidden_layers} layers; "
            "this architecture does not attend through transformers' attention interface"
        )
    unknown = sorted(set().union(*(layer.unknown for layer in layers.values())))
    if unknown or any(layer.masked for layer in layers.values()):
        what = f"arguments we do not know ({', '.join(unknown)})" if unknown else "a mask of its own"
        raise UnsupportedModelError(f"{name} cannot be served: its attention is called with {what}")
    if not calls:
        raise UnsupportedModelError(
            f"{name} cannot be served: it has no nn.Linear that an adapter could change"
        )
    return Probed(_layout(calls), tuple(layers[index] for index in sorted(layers)))


@dataclass(frozen=True, slots=True)
class _Call:
    module: str
    input: Tensor  # held, so that identity means the same input
    in_features: int
    out_features: int


class _StandIn(nn.Module):
    """Takes a linear's place during the probe: notes the call and answers zeros."""

    def __init__(self, path: str, original: nn.Linear, calls: list[_Call]) -> None:
        super().__init__()
        self.path, self.calls = path, calls
        self.in_features, self.out_features = original.in_features, original.out_features

    def forward(self, x: Tensor) -> Tensor:
        if all(call.module != self.path for call in self.calls):
            self.calls.append(_Call(self.path, x, self.in_features, self.out_features))
        return x.new_zeros(*x.shape[:-1], self.out_features)


@contextmanager
def _stand_ins(model: PreTrainedModel) -> Iterator[list[_Call]]:
    calls: list[_Call] = []
    head = model.get_output_embeddings()
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    try:
        for path, module in linears.items():
            model.set_submodule(path, _StandIn(path, module, calls))
        yield calls
    finally:
        for path, module in linears.items():
            model.set_submodule(path, module)


def _layout(calls: list[_Call]) -> Layout:
    """Consecutive calls of one parent with one input are siblings of one site."""
    runs: list[list[_Call]] = []
    for call in calls:
        parent = call.module.rpartition(".")[0]
        last = runs[-1][-1] if runs else None
        if last and last.input is call.input and last.module.rpartition(".")[0] == parent:
            runs[-1].append(call)
        else:
            runs.append([call])
    return Layout(
        tuple(
            Site(_group_name(run), run[0].in_features, tuple(Member(c.module, c.out_features) for c in run))
            for run in runs
        )
    )


def _group_name(run: list[_Call]) -> str:
    """The part the site plays in any layer: its path after the layer's number, members joined."""
    parent = run[0].module.rpartition(".")[0]
    part = re.split(r"\.\d+(?:\.|$)", parent, maxsplit=1)[-1]
    members = "+".join(call.module.rpartition(".")[2] for call in run)
    return f"{part}.{members}" if part else members
