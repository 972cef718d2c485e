"""What a transformers model does in one forward pass, learnt by running it on three tokens.

The probe sees every attention call (the shapes the cache needs, and models that bypass the attention interface), which
linears read the same input (siblings) and which do not read every token. Linears are stood in for while it runs:
bitsandbytes repacks weights in place at its first forward, and a large model would take its time. Knows nothing of
adapters' files or of the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.adapter import Layout, Member, Site
from server.errors import UnsupportedModelError
from server.model.attention import AttentionLayer, probing

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_TOKENS = 3
_PRODUCTS = (nn.Linear.forward, Linear4bit.forward, Linear8bitLt.forward)


@dataclass(frozen=True, slots=True)
class Probed:
    """The sites where a base can be adapted, its other linears, and what each layer's attention needs."""

    layout: Layout
    # linears that read some of a step's rows: experts, or what follows the last layer
    unadapted: tuple[str, ...]
    attention: tuple[AttentionLayer, ...]


def refuse_unserved_config(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for what a configuration already tells."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYER_TYPES)
    if getattr(config, "attention_chunk_size", None) and "llama4" in config.model_type:
        other = sorted({*other, "chunked_attention"})
    if (getattr(config, "max_position_embeddings", None) or 0) < 1:
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
    ids = torch.arange(3, 3 + _TOKENS, device=model.device)[None]
    seen = _seen(model, ids, [_TOKENS - 1], position_ids=ids - 3)
    _refuse_unserved_attention(name, config.num_hidden_layers, seen.layers)
    unadapted = _unadapted(model, seen.calls)
    _refuse_mixed_texts(model, ids, unadapted)
    others = frozenset(unadapted)
    sites = _sites([call for call in seen.calls.values() if call.module not in others])
    if not sites:
        raise UnsupportedModelError(
            f"{name} cannot be served: it has no nn.Linear that an adapter could change"
        )
    layout = Layout(sites, _idle(model, seen.calls))
    return Probed(layout, unadapted, tuple(seen.layers[index] for index in sorted(seen.layers)))


def _seen(
    model: PreTrainedModel, ids: Tensor, keep: Sequence[int], unadapted: Sequence[str] = (), **given: Tensor
) -> _Pass:
    """What a forward pass calls, and what it answers to the tokens of `keep`."""
    kept = torch.tensor(keep, device=model.device)
    with _stand_ins(model, ids[0], unadapted) as calls, probing() as layers, torch.inference_mode():
        try:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept, **given).logits
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be served: a forward pass over flattened tokens fails: {error}"
            ) from error
    if logits.shape[1] != len(keep):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be served: it computes the logits of all tokens, whichever are asked for "
            "(logits_to_keep)"
        )
    return _Pass(calls, layers, logits)


def _refuse_mixed_texts(model: PreTrainedModel, ids: Tensor, unadapted: Sequence[str]) -> None:
    """The first token of a text, between those of others, must be what such a text's only token is to the model.

    Two tokens are tried, for the one may stand between two experts, and rounding choose.
    """
    if all(_is_mixed(model, each[:, :1], each[:, 1:2], unadapted) for each in (ids, ids.flip(1))):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be served: it numbers a text's tokens by a rule of its own, or mixes "
            "tokens outside of attention, so that texts cannot stand side by side"
        )


def _is_mixed(model: PreTrainedModel, first: Tensor, another: Tensor, unadapted: Sequence[str]) -> bool:
    several = torch.cat([another, first, another], dim=1)
    beside = _seen(model, several, range(_TOKENS), unadapted, position_ids=torch.zeros_like(several))
    alone = _seen(model, first, range(1), unadapted)
    pairs = [
        (call.rows[1], alone.calls[path].rows[0])
        for path, call in beside.calls.items()
        if call.whole and path in alone.calls
    ]
    return not all(_alike(got, want) for got, want in [*pairs, (beside.logits[0, 1], alone.logits[0, 0])])


def _alike(got: Tensor, want: Tensor) -> bool:
    """But for what rounding makes of more rows."""
    bound = 1e-2 * float(want.nan_to_num().abs().max())
    return torch.allclose(got, want, rtol=0, atol=bound, equal_nan=True)


def _refuse_unserved_attention(name: str, expected: int, layers: Mapping[int, AttentionLayer]) -> None:
    if sorted(layers) != list(range(expected)):
        raise UnsupportedModelError(
            f"{name} cannot be served: paged attention saw {len(layers)} of {expected} layers; "
            "this architecture does not attend through transformers' attention interface"
        )
    unknown = sorted(set().union(*(layer.unknown for layer in layers.values())))
    reasons = {
        f"its attention is called with arguments we do not know ({', '.join(unknown)})": bool(unknown),
        "its attention is called with a mask of its own": any(layer.masked for layer in layers.values()),
        "its attention is not causal, a token sees those after it (BERT and its kin are causal with is_decoder in "
        "config.json)": not all(layer.causal for layer in layers.values()),
        "a layer attends more than once": not all(layer.once for layer in layers.values()),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModelError(f"{name} cannot be served: {reason}")


@dataclass(slots=True)
class _Call:
    module: str
    input: Tensor  # held, so that identity means the same input
    in_features: int
    out_features: int
    whole: bool = True  # every time it read all tokens

    @property
    def rows(self) -> Tensor:
        return self.input.reshape(-1, self.in_features)


@dataclass(frozen=True, slots=True)
class _Pass:
    calls: dict[str, _Call]
    layers: dict[int, AttentionLayer]
    logits: Tensor  # [1, tokens that were kept, vocabulary]


class _StandIn(nn.Module):
    """Takes a linear's place during the probe: notes the call and answers numbers that have nothing to do with x.

    Each token has numbers of its own, wherever it stands, so that a router sends them to different experts, and what
    is mixed of several is seen.
    """

    def __init__(self, path: str, original: nn.Linear, calls: dict[str, _Call], ids: Tensor) -> None:
        super().__init__()
        self.path, self.calls, self.ids = path, calls, ids
        self.in_features, self.out_features = original.in_features, original.out_features

    def forward(self, x: Tensor) -> Tensor:
        call = self.calls.setdefault(self.path, _Call(self.path, x, self.in_features, self.out_features))
        rows = x.shape[:-1].numel()
        call.whole &= rows == len(self.ids)
        ids = self.ids if rows == len(self.ids) else self.ids.new_zeros(rows)
        answer = (7 * ids[:, None] + torch.arange(self.out_features, device=x.device)).sin()
        return answer.to(x.dtype).view(*x.shape[:-1], self.out_features)


@contextmanager
def _stand_ins(
    model: PreTrainedModel,
    ids: Tensor,  # [tokens]
    unadapted: Sequence[str],
) -> Iterator[dict[str, _Call]]:
    """For all linears; of `unadapted` it is not known which tokens they read, so they answer the same to each."""
    calls: dict[str, _Call] = {}
    linears = _linears(model)
    nobodys = dict.fromkeys(unadapted, ids.new_zeros(0))
    try:
        for path, module in linears.items():
            model.set_submodule(path, _StandIn(path, module, calls, nobodys.get(path, ids)))
        yield calls
    finally:
        for path, module in linears.items():
            model.set_submodule(path, module)


def _linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All but the head, and but for what calls itself one and computes something else, as Phimoe's router does."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward in _PRODUCTS and module is not head
    }


def _unadapted(model: PreTrainedModel, calls: Mapping[str, _Call]) -> tuple[str, ...]:
    """Linears whose rows are not the step's, and those of the same name but for numbers: an expert that happened to
    be chosen for every token, or for none, is an expert."""
    partial = {_without_numbers(call.module) for call in calls.values() if not call.whole}
    return tuple(path for path in _linears(model) if _without_numbers(path) in partial)


def _without_numbers(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _idle(model: PreTrainedModel, calls: Mapping[str, _Call]) -> tuple[str, ...]:
    """The parts beside the text model that no text passes through: towers for images or sound.

    Inside of the text model, what three tokens did not reach another text may: an expert.
    """
    decoder = model.get_decoder()
    home = next((path for path, module in model.named_modules() if path and module is decoder), None)
    if home is None:
        return ()
    passed = [f"{home}.", *(f"{path}." for path in calls)]
    others = (linear for linear in _linears(model) if not linear.startswith(f"{home}."))
    parts = (_unpassed(linear, passed) for linear in others)
    return tuple(dict.fromkeys(part for part in parts if part))


def _unpassed(linear: str, passed: list[str]) -> str | None:
    """The largest part around a linear that has none of `passed` in it."""
    names = linear.split(".")
    around = (".".join(names[:count]) for count in range(1, len(names) + 1))
    return next((part for part in around if not any(one.startswith(f"{part}.") for one in passed)), None)


def _sites(calls: list[_Call]) -> tuple[Site, ...]:
    """Consecutive calls of one parent with one input are siblings of one site."""
    runs: list[list[_Call]] = []
    for call in calls:
        parent = call.module.rpartition(".")[0]
        last = runs[-1][-1] if runs else None
        if last and last.input is call.input and last.module.rpartition(".")[0] == parent:
            runs[-1].append(call)
        else:
            runs.append([call])
    return tuple(
        Site(_group_name(run), run[0].in_features, tuple(Member(c.module, c.out_features) for c in run))
        for run in runs
    )


def _group_name(run: list[_Call]) -> str:
    """The part the site plays in any layer: its path after the layer's number, members joined."""
    parent = run[0].module.rpartition(".")[0]
    part = re.split(r"\.\d+(?:\.|$)", parent, maxsplit=1)[-1]
    members = "+".join(call.module.rpartition(".")[2] for call in run)
    return f"{part}.{members}" if part else members
