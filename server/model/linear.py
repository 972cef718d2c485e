"""Where a kernel meets a module: base product plus the deltas of every adapter in the step.

A `LoRALinear` stands in the model where a linear stood. Siblings that read the same input (q, k, v; gate, up) form one
`LinearGroup`: the first of them to be called computes all. Knows nothing of how pages came to the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from adapters.adapter import Site
from adapters.pool import SitePages
from kernels import reference
from server.model.base_linear import BaseLinear
from server.model.context import current_context


@dataclass(slots=True, eq=False)
class LinearGroup:
    """Sibling linears of one site: one base product, one shrink and one expand per segment."""

    site: Site
    base: BaseLinear
    pages: SitePages | None = None  # set once, when the pool is made
    _input: Tensor | None = field(default=None, repr=False)
    _outputs: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(member.out_features for member in self.site.members)

    def output(self, x: Tensor, member: int) -> Tensor:
        """One member's output; all members are computed when `x` is first seen, and let go after the last."""
        if self._input is not x:
            rows = x.reshape(-1, x.shape[-1])
            y = self.base(rows)
            self.add_deltas(y, rows)
            self._input = x
            self._outputs = y.view(*x.shape[:-1], y.shape[-1]).split(self.widths, dim=-1)
        result = self._outputs[member]
        if member == len(self._outputs) - 1:
            self._input, self._outputs = None, ()
        return result

    def add_deltas(
        self,
        y: Tensor,  # [rows, sum of widths], written
        x: Tensor,  # [rows, in]
    ) -> None:
        """`y += expand(shrink(x))` over the segments of the running step."""
        context = current_context()
        if context is None or self.pages is None:
            return
        for segment in context.segments.get(self.site.group, ()):
            v = reference.shrink(x, self.pages.a, self.pages.scale, segment)
            reference.expand(y, v, self.pages.b, self.widths, segment)


class LoRALinear(nn.Module):
    """Stands for one linear of the base; its output is that member's share of the group's."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.group = group
        self.member = member
        self.in_features = group.site.in_features
        self.out_features = group.widths[member]

    def forward(self, x: Tensor) -> Tensor:
        return self.group.output(x, self.member)

    def extra_repr(self) -> str:
        return f"{self.group.site.members[self.member].module}, {self.in_features} -> {self.out_features}"
