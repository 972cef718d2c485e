"""A transformers model turned into one that serves many adapters at once: probed, its linears and rotaries replaced.

Knows nothing of where the weights came from, nor of pages, sequences or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import PreTrainedModel

from adapters.adapter import Layout, Site
from adapters.page_copy import SitePages
from kernels.plans import Heads
from server.model.attention import IMPLEMENTATION, AttentionLayer, register
from server.model.compiled_layer import install_compiled_layers
from server.model.compiled_stack import install_compiled_stacks
from server.model.kernel_set import Kernels, plain
from server.model.linear import (
    BaseLinear,
    LinearGroup,
    LoRALinear,
    ModuleLinear,
    Unadapted,
    exact_linear,
)
from server.model.probe import probe, refuse_unserved_config
from server.model.steady import (
    install_compiled_rotation,
    install_compiled_rows,
    install_rotary_tables,
    install_steady_activations,
)

LinearBackend = Literal["exact", "bitsandbytes"]


@dataclass(frozen=True, slots=True)
class ServableModel:
    """The model with every linear in its place, ready for a runner."""

    model: PreTrainedModel
    layout: Layout
    groups: tuple[LinearGroup, ...]  # index as in layout.sites
    attention: tuple[AttentionLayer, ...]
    max_model_len: int
    kernels: Kernels

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.model.dtype)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    @property
    def heads(self) -> Heads:
        """Of the layers' attention."""
        return Heads(
            max(layer.group for layer in self.attention), min(layer.kv_heads for layer in self.attention)
        )

    def attach(self, pages: Sequence[SitePages]) -> None:
        """Give each group the pool's pages of its site."""
        for group, site_pages in zip(self.groups, pages, strict=True):
            group.deltas = self.kernels.deltas(site_pages, group.widths)


def make_servable(
    model: PreTrainedModel,
    *,
    backend: LinearBackend = "exact",
    kernels: Kernels | None = None,
    max_model_len: int | None = None,
) -> ServableModel:
    """Probe the model and replace what has state per request, in place; plain PyTorch computes if nobody else is given.

    Raises `UnsupportedModelError` for an architecture that cannot be served, naming it and the reason.
    """
    kernels = kernels or plain()
    refuse_unserved_config(model)
    register()
    model.eval().requires_grad_(False)
    model.set_attn_implementation(IMPLEMENTATION)
    config = model.config.get_text_config(decoder=True)
    length = min(max_model_len or config.max_position_embeddings, config.max_position_embeddings)
    install_rotary_tables(model, length)
    _install_rows(model, kernels)
    findings = probe(model)
    groups = tuple(_install_group(model, site, backend, kernels) for site in findings.layout.sites)
    for path in findings.unadapted:
        linear = cast(nn.Linear, model.get_submodule(path))
        model.set_submodule(path, Unadapted(_base([linear], model.dtype, backend, kernels)))
    _install_head(model, kernels)
    if kernels.layers is not None:
        install_compiled_layers(model, kernels, findings.attention)
        install_compiled_stacks(model, kernels)
    return ServableModel(model, findings.layout, groups, findings.attention, length, kernels)


def _install_rows(model: PreTrainedModel, kernels: Kernels) -> None:
    """Norms, gated MLPs, activations and rotations by kernels that have them for this dtype."""
    rows = kernels.rows if kernels.rows and model.dtype in kernels.rows.dtypes else None
    if rows is not None or (model.device.type == "cpu" and model.dtype is torch.float32):
        install_steady_activations(model, rows)
    if rows is not None:
        install_compiled_rows(model, rows)
        install_compiled_rotation(model, rows)


def _install_group(
    model: PreTrainedModel, site: Site, backend: LinearBackend, kernels: Kernels
) -> LinearGroup:
    members = [cast(nn.Linear, model.get_submodule(member.module)) for member in site.members]
    group = LinearGroup(site, _base(members, model.dtype, backend, kernels))
    for position, member in enumerate(site.members):
        model.set_submodule(member.module, LoRALinear(group, position))
    return group


def _install_head(model: PreTrainedModel, kernels: Kernels) -> None:
    """The output embedding by kernels that have a product for it. One that shares its weights with the input embedding
    may be held beside them: the one is read whole, the other by rows."""
    head = model.get_output_embeddings()
    product = kernels.head([head], model.dtype)
    if product is not None:
        (path,) = (path for path, module in model.named_modules() if module is head)
        model.set_submodule(path, Unadapted(product))


def _base(
    members: Sequence[nn.Linear], dtype: torch.dtype, backend: LinearBackend, kernels: Kernels
) -> BaseLinear:
    quantized = isinstance(members[0], Linear4bit | Linear8bitLt)
    if any(type(member) is not type(members[0]) for member in members) or (
        quantized and backend == "bitsandbytes"
    ):
        return ModuleLinear(tuple(members))
    return kernels.linear(members, dtype) or exact_linear(members, dtype)
