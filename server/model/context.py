"""What one forward pass knows beside its activations: the only state that layers reach without an argument.

`nn.Linear` and transformers' attention functions receive no per-step arguments of ours, so the runner holds a
`ForwardContext` in a `with` around the call. It refuses to nest. Knows nothing of sequences or scheduling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from kernels.cpu.layer import StepCall
from kernels.plans import AttentionPlan, DeltaPlan
from kernels.segments import FlatSegments, Segment, Spans

if TYPE_CHECKING:  # kernels are functions of this context
    from server.model.kernel_set import Kernels


@dataclass(frozen=True, slots=True)
class StepPlans:
    """Spans and segments as tables on the device, in the form of the GPU's kernels."""

    attention: AttentionPlan
    deltas: Mapping[str, DeltaPlan]  # group -> tiles and jobs; a group without adapters is not there


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """The metadata of one step, read by attention and by every adapted linear."""

    kv_index: Tensor  # [rows] int64: where each row's key and value are written
    spans: Spans  # which rows attend to which blocks
    segments: Mapping[str, tuple[Segment, ...]]  # group -> which rows read which adapter pages
    kv_caches: tuple[tuple[Tensor, Tensor], ...]  # per layer: keys and values [positions, heads, width]
    kernels: Kernels | None = None  # who computes; plain PyTorch if not said
    plans: StepPlans | None = None  # of a step on a GPU
    # by the angles of its rows
    compiled_steps: dict[tuple[Tensor, Tensor], StepCall] = field(default_factory=dict)
    _flat: dict[str, FlatSegments] = field(default_factory=dict)

    def flat_segments(self, group: str) -> FlatSegments:
        """The group's segments as arrays, made once for all layers."""
        if group not in self._flat:
            self._flat[group] = FlatSegments.of(self.segments[group])
        return self._flat[group]


_current: ContextVar[ForwardContext | None] = ContextVar("loraplex_forward_context", default=None)


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Hold `context` for the layers of one forward pass."""
    assert _current.get() is None, "a forward pass started inside another"
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def current_context() -> ForwardContext | None:
    """The context of the running forward pass, or None outside one (a probe, a plain call in a test)."""
    return _current.get()
