"""The nouns of this package: where a base can be adapted (`Layout`) and one adapter's weights (`Adapter`).

Plain data. Knows nothing of files, of the device pool or of how a delta is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Member:
    """One adaptable linear of the base, by its module path."""

    module: str  # "model.layers.0.self_attn.q_proj"
    out_features: int


@dataclass(frozen=True, slots=True)
class Site:
    """One place of the base where deltas are added: sibling linears that read the same input.

    Sites of all layers that play the same part form one group (`group`), which shares a page table.
    """

    group: str  # "self_attn.q_proj+k_proj+v_proj"
    in_features: int
    members: tuple[Member, ...]

    @property
    def out_features(self) -> int:
        """The width of the members' outputs side by side."""
        return sum(member.out_features for member in self.members)


@dataclass(frozen=True)
class Layout:
    """All sites of a base model, in the order of its layers.

    `idle` are the parts of a multimodal base that no text passes through: an adapter changes nothing there.
    """

    sites: tuple[Site, ...]
    idle: tuple[str, ...] = ()  # "model.vision_tower"

    @cached_property
    def groups(self) -> Mapping[str, tuple[int, ...]]:
        """Group name to the indices of its sites, in first-seen order."""
        found: dict[str, list[int]] = {}
        for index, site in enumerate(self.sites):
            found.setdefault(site.group, []).append(index)
        return {group: tuple(indices) for group, indices in found.items()}

    @cached_property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Module path to (site index, member index)."""
        return {
            member.module: (index, position)
            for index, site in enumerate(self.sites)
            for position, member in enumerate(site.members)
        }


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one linear: `y += scale * (x @ a.T) @ b`, weights as trained, scale apart.

    Source: Hu et al. 2021 (LoRA), with `b` stored transposed so that both factors are rank-major.
    """

    site: int
    member: int
    a: Tensor  # [rank, in_features]
    b: Tensor  # [rank, out_features]
    scale: float  # alpha / r, or alpha / sqrt(r) with rsLoRA

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class Adapter:
    """One generation's weights in host memory, checked against a layout."""

    generation: str  # sha256 over the two files as stored
    deltas: tuple[Delta, ...]

    @property
    def rank(self) -> int:
        """The largest rank of any delta."""
        return max(delta.rank for delta in self.deltas)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors in host memory."""
        return sum(delta.a.nbytes + delta.b.nbytes for delta in self.deltas)
