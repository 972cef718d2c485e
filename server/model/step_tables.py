"""A step on a GPU as one int32 buffer: its rows, then the kernels' plans, each at a place that depends on sizes alone.

One copy takes it to the device, and a captured graph reads it from the same addresses in every replay. Knows nothing
of sequences, nor of who runs the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.plans import AttentionPlan, AttentionSize, DeltaPlan, Heads
from kernels.segments import FlatSpans, Segment
from server.model.context import StepPlans
from server.model.kv_cache import PADDING_BLOCK
from server.model.runner import StepInputs


@dataclass(frozen=True, slots=True)
class Filled:
    """How much of a buffer a step takes: int32 from the first on, and what each plan's `fill` said of what."""

    size: int
    segments: Mapping[str, Sequence[Segment]]
    deltas: Mapping[str, int]
    attention: AttentionSize


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A buffer on the device, taken apart."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64
    kv_index: Tensor  # [rows] int64
    logits_rows: Tensor | None  # [wanted] int64; None: logits of all rows
    plans: StepPlans


@dataclass(frozen=True)
class StepLayout:
    """The sizes of a step, or the largest of a bucket."""

    rows: int  # those that only pad included
    wanted: int | None  # rows whose logits are asked for, and in a bucket spans too; None: all
    most_pages: Mapping[str, int]  # group -> pages of one segment; groups without adapters are not there
    most_blocks: int  # of all spans together
    block_size: int
    queries: int  # of an attention tile
    enough: int  # attention tiles that keep the device busy; 0: their keys are not shared
    fixed: bool  # whether plans are those of batch-invariant kernels

    @classmethod
    def of(cls, inputs: StepInputs, block_size: int, heads: Heads, fixed: bool) -> StepLayout:
        """Just as large as the step."""
        spans = FlatSpans.of(inputs.spans)
        start, end, *_ = spans.table.T
        longest = int((end - start).max(initial=1))
        return cls(
            rows=len(inputs.token_ids),
            wanted=len(inputs.logits_rows),
            most_pages={g: max(len(s.pages) for s in segments) for g, segments in inputs.segments.items() if segments},
            most_blocks=len(spans.blocks),
            block_size=block_size,
            queries=heads.queries(longest, fixed=fixed),
            enough=heads.enough,
            fixed=fixed,
        )  # fmt: skip

    @classmethod
    def bucket(
        cls,
        rows: int,
        wanted: int | None,  # None: decodes, a row of each span, all wanted
        *,
        groups: Sequence[str],
        pages: int,  # of a segment, at most; 0: without adapters
        most_blocks: int,
        block_size: int,
        heads: Heads,
        fixed: bool,
    ) -> StepLayout:
        """The largest step of a graph.

        Whether keys may be shared is compiled in, and costs registers: with more rows of prompts than fill two devices
        they may not.
        """
        queries = heads.queries(1 if wanted is None else rows, fixed=fixed)
        few = wanted is None or rows <= 2 * heads.enough * queries
        return cls(
            rows=rows,
            wanted=wanted,
            most_pages=dict.fromkeys(groups, pages) if pages else {},
            most_blocks=most_blocks,
            block_size=block_size,
            queries=queries,
            enough=heads.enough if few else 0,
            fixed=fixed,
        )

    @property
    def logits(self) -> int:
        """Rows of logits that come back."""
        return self.rows if self.wanted is None else self.wanted

    @property
    def most_tiles(self) -> int:
        """Attention's, of any step that fits: each span has one that is not full, and so has what only pads."""
        return min(self.rows, self.rows // self.queries + self.logits + 1)

    @property
    def most_attention(self) -> AttentionSize:
        """Of any step that fits; with `fixed`, of decodes."""
        if self.fixed:
            return AttentionPlan.most_fixed(self.most_tiles, self.enough, self.most_blocks, self.block_size)
        return AttentionPlan.most(self.most_tiles, self.queries, self.enough)

    @cached_property
    def _places(self) -> dict[str | None, int]:
        """Where each group's plan begins, and (under None) attention's, which comes last: its end varies most."""
        at = _aligned(3 * self.rows + (self.wanted or 0))
        places: dict[str | None, int] = {}
        for group, most in self.most_pages.items():
            places[group] = at
            at = _aligned(at + DeltaPlan.sizes(self.rows, most))
        return {**places, None: at}

    @property
    def size(self) -> int:
        """How many int32 the buffer needs."""
        return self._places[None] + AttentionPlan.sizes(self.rows, self.most_blocks, self.enough)

    def fill(self, out: NDArray[np.int32], inputs: StepInputs, before: Filled | None = None) -> Filled:
        """Write a step that is no larger than this; rows that only pad read token 0 and write to the padding block.

        Where fewer logits are asked for than there is room for, the rest are row 0's.

        `before` is the step of this layout that `out` holds: plans of the very same segments are left as they are.
        """
        given = len(inputs.token_ids)
        rows = out[: 3 * self.rows].reshape(3, self.rows)
        rows[:2, given:] = 0
        rows[2, given:] = PADDING_BLOCK * self.block_size
        rows[0, :given], rows[1, :given], rows[2, :given] = (
            inputs.token_ids,
            inputs.positions,
            inputs.kv_index,
        )
        if self.wanted is not None:
            rows_wanted = out[3 * self.rows : 3 * self.rows + self.wanted]
            rows_wanted[: len(inputs.logits_rows)] = inputs.logits_rows
            rows_wanted[len(inputs.logits_rows) :] = 0
        if before is not None and before.segments is inputs.segments:
            deltas = before.deltas
        else:
            deltas = self._fill_deltas(out, inputs.segments)
        start = self._places[None]
        used, attention = AttentionPlan.fill(
            out[start : self.size], inputs.spans, self.rows, self.queries, self.enough, fixed=self.fixed
        )
        return Filled(start + used, inputs.segments, deltas, attention)

    def _fill_deltas(
        self, out: NDArray[np.int32], segments: Mapping[str, Sequence[Segment]]
    ) -> dict[str, int]:
        """Write each group's plan; a group with the segments of one before takes a copy of its plan."""
        used: dict[str, int] = {}
        # segments and pages: where a plan lies, its size
        written: dict[tuple[int, int], tuple[int, int]] = {}
        for group, most in self.most_pages.items():
            start, held = self._places[group], segments.get(group, ())
            size = DeltaPlan.sizes(self.rows, most)
            if (id(held), most) in written:
                source, taken = written[id(held), most]
                out[start : start + taken] = out[source : source + taken]
            else:
                taken = DeltaPlan.fill(out[start : start + size], held, self.rows, fixed=self.fixed)
                written[id(held), most] = start, taken
            used[group] = taken
        return used

    def view(
        self,
        buffer: Tensor,  # [size or more] int32
        filled: Filled | None = None,
    ) -> StepTensors:
        """The buffer taken apart; without `filled`, for any step that fits (in a graph)."""
        rows = buffer[: 3 * self.rows].long().view(3, self.rows)
        wanted = None
        if self.wanted is not None:
            wanted = buffer[3 * self.rows : 3 * self.rows + self.wanted].long()
        deltas = {
            group: DeltaPlan.view(
                buffer[self._places[group] :],
                self.rows,
                most,
                used=filled.deltas[group] if filled else None,
                fixed=self.fixed,
            )
            for group, most in self.most_pages.items()
        }
        attention = AttentionPlan.view(
            buffer[self._places[None] :],
            self.rows,
            self.queries,
            self.enough,
            self.block_size,
            filled.attention if filled else self.most_attention,
        )
        return StepTensors(rows[0], rows[1], rows[2], wanted, StepPlans(attention, deltas))


def _aligned(place: int) -> int:
    """The first from there on at which 16 bytes begin: for other addresses Triton compiles a kernel again."""
    return -(-place // 4) * 4
