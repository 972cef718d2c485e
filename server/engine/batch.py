"""Turns scheduled sequences into the flattened rows of one step, before its time where that can be.

Knows nothing of devices or of sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from kernels.segments import FlatSpans, Segment, segments_of
from server.engine.scheduler import Residency, Scheduled, Scheduler
from server.model.device_runner import DeviceRunner
from server.model.runner import Runner, StepInputs

Segments = Mapping[str, tuple[Segment, ...]]


def in_row_order(batch: Iterable[Scheduled]) -> list[Scheduled]:
    """Equal adapters side by side, so that each is one segment."""
    return sorted(batch, key=lambda item: item.sequence.generation or "")


class Inputs:
    """What each step reads: made while the device runs the step before, where that step could be foreseen.

    Nothing of a decode but its token is unknown until the step before has ended. A step that was foreseen and does not
    come is forgotten: it took blocks for sequences that run, and nothing else.
    """

    def __init__(self, runner: Runner | DeviceRunner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._block_size = scheduler.limits.block_size
        self._batch: list[Scheduled] = []
        self._made: StepInputs | None = None
        self._launches = False
        self.foreseen = 0  # steps that were made beforehand

    def only_launches(self, batch: list[Scheduled]) -> bool:
        """Whether the step is at the device already, for the greater part, and takes the host no more time."""
        return self._launches and self._batch == batch

    def of(self, batch: list[Scheduled]) -> StepInputs:
        """The step's inputs, those that were made beforehand if it is the one that was foreseen."""
        made, foreseen = self._made, self._batch
        self._made, self._batch, self._launches = None, [], False
        if made is None or foreseen != batch:
            return build(batch, self._scheduler.residency, self._block_size)
        made.token_ids[:] = [item.sequence.tokens[-1] for item in batch]
        self.foreseen += 1
        return made

    def foresee(self, batch: list[Scheduled], inputs: StepInputs) -> None:
        """Make the inputs of the step after `batch`, whose own are `inputs`."""
        self._batch = self._scheduler.foresee(batch)
        if not self._batch:
            return
        segments = inputs.segments
        if self._batch is not batch:
            segments = _segments(self._batch, self._scheduler.residency)
        positions = np.array([len(item.sequence.tokens) for item in self._batch], dtype=np.int64)
        self._made = _decodes(self._batch, positions, segments, self._block_size)
        self._launches = self._runner.prepare(self._made)


def build(batch: list[Scheduled], residency: Residency, block_size: int) -> StepInputs:
    """The step's rows, in the order of `batch`.

    Logits are asked for where a sequence reaches its newest token, and after all those for rows of prompts.
    """
    first = np.array([item.sequence.computed for item in batch], dtype=np.int64)
    if all(item.decodes for item in batch):
        inputs = _decodes(batch, first, _segments(batch, residency), block_size)
        inputs.token_ids[:] = [item.sequence.tokens[-1] for item in batch]
        return inputs
    counts = np.array([item.count for item in batch], dtype=np.int64)
    ends = np.cumsum(counts)
    starts = ends - counts
    positions = np.arange(ends[-1]) + np.repeat(first - starts, counts)
    spans = _spans(batch, starts, ends, first + counts)
    token_ids = np.empty(len(positions), dtype=np.int64)
    drawn, scored = [], []
    for item, start, at in zip(batch, starts.tolist(), first.tolist(), strict=True):
        end = start + item.count
        token_ids[start:end] = item.sequence.tokens[at : at + item.count]
        drawn += [end - 1] if item.samples else []
        scored += [start + position - at for position in item.scores]
    return StepInputs(
        token_ids=token_ids,
        positions=positions,
        kv_index=_kv_index(spans, np.repeat(spans.table[:, 3], counts), positions, block_size),
        logits_rows=np.array(drawn + scored, dtype=np.int64),
        spans=spans,
        segments=_segments(batch, residency),
    )


def _decodes(
    batch: list[Scheduled],
    positions: NDArray[np.int64],  # [sequences]
    segments: Segments,
    block_size: int,
) -> StepInputs:
    """A row each and its logits; the token ids are still to be written."""
    rows = np.arange(len(batch))
    spans = _spans(batch, rows, rows + 1, positions + 1)
    return StepInputs(
        token_ids=np.zeros(len(batch), dtype=np.int64),
        positions=positions,
        kv_index=_kv_index(spans, spans.table[:, 3], positions, block_size),
        logits_rows=rows,
        spans=spans,
        segments=segments,
    )


def _spans(
    batch: list[Scheduled],
    starts: NDArray[np.int64],  # [sequences]
    ends: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> FlatSpans:
    """Each sequence's rows and a copy of its block table."""
    tables = [item.sequence.blocks for item in batch]
    first = np.array([0, *accumulate(map(len, tables))][:-1], dtype=np.int64)
    blocks = np.frombuffer(b"".join(tables), dtype=np.int32)
    return FlatSpans(np.stack((starts, ends, lengths, first), axis=1), blocks)


def _kv_index(
    spans: FlatSpans,
    first_block: NDArray[np.int64],  # [rows]
    positions: NDArray[np.int64],  # [rows]
    block_size: int,
) -> NDArray[np.int64]:  # [rows]
    blocks: NDArray[np.int64] = spans.blocks[first_block + positions // block_size].astype(np.int64)
    return blocks * block_size + positions % block_size


def _segments(batch: list[Scheduled], residency: Residency) -> Segments:
    """By group. Groups with the same pages share one tuple, so that whoever makes tables of them makes one."""
    tables = [residency.pages(item.sequence.generation) for item in batch]
    counts = [item.count for item in batch]
    made: dict[tuple[tuple[int, ...], ...], tuple[Segment, ...]] = {}
    found: dict[str, tuple[Segment, ...]] = {}
    for group in dict.fromkeys(group for table in tables for group in table):
        pages = tuple(table.get(group, ()) for table in tables)
        if pages not in made:
            made[pages] = segments_of(
                [(count, held, (1.0,) * len(held)) for count, held in zip(counts, pages, strict=True)]
            )
        found[group] = made[pages]
    return found
