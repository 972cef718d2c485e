"""Paged attention as a transformers attention implementation, and the probe that learns what each layer asks of it.

Registered under one name; no mask function is registered with it, so transformers builds no masks. Knows nothing of
scheduling: rows, blocks and caches come from the forward context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from kernels import reference
from kernels.cpu import operations
from kernels.cpu.library import Library
from server.model.context import ForwardContext, current_context

IMPLEMENTATION = "loraplex_paged"
_HARMLESS = frozenset(
    {
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
        "position_ids",
        "position_embeddings",
        "is_causal",
        "cache_position",
        "cache_params",
        "indexer",
        "logits_to_keep",
        "dropout",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
    }
)


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What one layer's attention was called with: the shapes its cache needs, and anything we do not know."""

    kv_heads: int
    k_width: int
    v_width: int
    window: int | None
    unknown: frozenset[str]
    masked: bool
    group: int = 1  # query heads that share a key head
    plain: bool = True  # neither softcap nor sinks
    causal: bool = True
    once: bool = True  # in a forward pass


class Attend(Protocol):
    """Write a step's keys and values to a layer's cache, and attend to each row's own sequence."""

    def __call__(
        self,
        context: ForwardContext,
        layer: int,
        q: Tensor,  # [rows, query heads, k width]
        k: Tensor,  # [rows, kv heads, k width]
        v: Tensor,  # [rows, kv heads, v width]
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:  # [rows, query heads, v width]
        ...


def plain_attention(
    context: ForwardContext, layer: int, q: Tensor, k: Tensor, v: Tensor, **asked: Any
) -> Tensor:
    """`Attend` in plain PyTorch."""
    k_cache, v_cache = context.kv_caches[layer]
    reference.write_kv(k_cache, k, context.kv_index)
    reference.write_kv(v_cache, v, context.kv_index)
    return reference.attention(q, k_cache, v_cache, context.spans, **asked)


def compiled_attention(
    library: Library, context: ForwardContext, layer: int, q: Tensor, k: Tensor, v: Tensor, **asked: Any
) -> Tensor:
    """`Attend` by the CPU's kernels, which are for float32."""
    if q.dtype is not torch.float32:
        return plain_attention(context, layer, q, k, v, **asked)
    k_cache, v_cache = context.kv_caches[layer]
    operations.write_kv(library, k_cache, v_cache, k, v, context.kv_index, context.spans.rows)
    return operations.attention(library, q, k_cache, v_cache, context.spans, **asked)


_probe: ContextVar[dict[int, AttentionLayer] | None] = ContextVar("loraplex_attention_probe", default=None)


@contextmanager
def probing() -> Iterator[dict[int, AttentionLayer]]:
    """Record each layer's call by layer index instead of attending."""
    seen: dict[int, AttentionLayer] = {}
    token = _probe.set(seen)
    try:
        yield seen
    finally:
        _probe.reset(token)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, query heads, rows, k width]
    key: Tensor,  # [1, kv heads, rows, k width]
    value: Tensor,  # [1, kv heads, rows, v width]
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Write this step's keys and values to the cache and attend to each row's own sequence."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    seen = _probe.get()
    if seen is not None:
        unknown = frozenset(name for name, given in others.items() if given is not None) - _HARMLESS
        causal = others.get("is_causal")  # the module's word, unless the call has another
        seen[layer] = AttentionLayer(
            key.shape[1],
            key.shape[3],
            value.shape[3],
            sliding_window,
            unknown,
            attention_mask is not None,
            query.shape[1] // key.shape[1],
            plain=softcap is None and s_aux is None,
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            once=layer not in seen,
        )
        return _stand_in(query, key, value), None
    context = current_context()
    assert context is not None, "paged attention ran outside a forward context"
    q, k, v = (rows[0].transpose(0, 1) for rows in (query, key, value))  # [rows, heads, width]
    attend = context.kernels.attend if context.kernels else plain_attention
    out = attend(
        context,
        layer,
        q,
        k,
        v,
        scale=scaling if scaling is not None else query.shape[3] ** -0.5,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def _stand_in(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [1, rows, query heads, v width]
    """An answer to a probe: a row's own, and another one where its query and key are turned elsewhere, or its value is
    another."""
    shared = (key.mean(-1) + value.mean(-1)).repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query.mean(-1) + shared).transpose(1, 2)[..., None].repeat(1, 1, 1, value.shape[3])


def register() -> None:
    """Make the implementation known to transformers; doing it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
