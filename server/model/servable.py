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
from kernels.cpu.library import Library
from server.model.attention import IMPLEMENTATION, AttentionLayer, register
from server.model.linear import (
    BaseLinear,
    DenseLinear,
    FourBitLinear,
    Head,
    Int8Linear,
    LinearGroup,
    LoRALinear,
    ModuleLinear,
    PackedLinear,
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
    library: Library | None  # of compiled kernels, where they run

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.model.dtype)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    def attach(self, pages: Sequence[SitePages]) -> None:
        """Give each group the pool's pages of its site."""
        for group, site_pages in zip(self.groups, pages, strict=True):
            group.attach(site_pages, self.library)


def make_servable(
    model: PreTrainedModel,
    *,
    backend: LinearBackend = "exact",
    library: Library | None = None,
    max_model_len: int | None = None,
) -> ServableModel:
    """Probe the model and replace what has state per request, in place; `library` multiplies by the base if given.

    Raises `UnsupportedModelError` for an architecture that cannot be served, naming it and the reason.
    """
    refuse_unserved_config(model)
    register()
    model.eval().requires_grad_(False)
    model.set_attn_implementation(IMPLEMENTATION)
    config = model.config.get_text_config(decoder=True)
    length = min(max_model_len or config.max_position_embeddings, config.max_position_embeddings)
    install_rotary_tables(model, length)
    if model.device.type == "cpu" and model.dtype is torch.float32:
        install_steady_activations(model, library)
        if library is not None:
            install_compiled_rows(model, library)
            install_compiled_rotation(model, library)
    findings = probe(model)
    groups = tuple(_install_group(model, site, backend, library) for site in findings.layout.sites)
    if library is not None:
        _install_head(model, library)
    return ServableModel(model, findings.layout, groups, findings.attention, length, library)


def _install_group(
    model: PreTrainedModel, site: Site, backend: LinearBackend, library: Library | None
) -> LinearGroup:
    members = [cast(nn.Linear, model.get_submodule(member.module)) for member in site.members]
    group = LinearGroup(site, _base(members, model.dtype, backend, library))
    for position, member in enumerate(site.members):
        model.set_submodule(member.module, LoRALinear(group, position))
    return group


def _install_head(model: PreTrainedModel, library: Library) -> None:
    """The output embedding by the same kernels. One that shares its weights with the input embedding is packed beside
    them: the one is read whole, the other by rows."""
    head = model.get_output_embeddings()
    (path,) = (path for path, module in model.named_modules() if module is head)
    model.set_submodule(path, Head(PackedLinear.of([head], library)))


def _base(
    members: Sequence[nn.Linear], dtype: torch.dtype, backend: LinearBackend, library: Library | None
) -> BaseLinear:
    quantized = isinstance(members[0], Linear4bit | Linear8bitLt)
    if any(type(member) is not type(members[0]) for member in members) or (
        quantized and backend == "bitsandbytes"
    ):
        return ModuleLinear(tuple(members))
    if library is not None and PackedLinear.serves(members):
        return PackedLinear.of(members, library)
    if isinstance(members[0], Linear4bit):
        return FourBitLinear.of(cast(Sequence[Linear4bit], members), dtype)
    if isinstance(members[0], Linear8bitLt):
        return Int8Linear.of(cast(Sequence[Linear8bitLt], members), dtype)
    return DenseLinear.of(members)
