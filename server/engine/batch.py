"""Turns scheduled sequences into the flattened rows of one step. Knows nothing of devices or of sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from kernels.segments import Segment, Span, segments_of
from server.engine.scheduler import Residency, Scheduled
from server.model.runner import StepInputs


def in_row_order(batch: Iterable[Scheduled]) -> list[Scheduled]:
    """Equal adapters side by side, so that each is one segment."""
    return sorted(batch, key=lambda item: item.sequence.generation or "")


def build(batch: list[Scheduled], residency: Residency, block_size: int) -> StepInputs:
    """The step's rows, in the order of `batch`.

    Logits are asked for where a sequence reaches its newest token, and after all those for rows of prompts.
    """
    rows = sum(item.count for item in batch)
    token_ids, positions, kv_index = np.empty((3, rows), dtype=np.int64)
    spans: list[Span] = []
    logits_rows: list[int] = []
    prompt_rows: list[int] = []
    row = 0
    for item in batch:
        sequence, into = item.sequence, slice(row, row + item.count)
        first, end = sequence.computed, sequence.computed + item.count
        blocks: list[int] | NDArray[np.int32] = sequence.blocks
        if item.count == 1:  # most rows of most steps: no arrays for one number
            token_ids[row], positions[row] = sequence.tokens[first], first
            kv_index[row] = blocks[first // block_size] * block_size + first % block_size
        else:
            blocks, at = np.array(blocks, dtype=np.int32), np.arange(first, end)
            token_ids[into] = sequence.tokens[first:end]
            positions[into] = at
            kv_index[into] = blocks[at // block_size] * block_size + at % block_size
        spans.append(Span(row, into.stop, end, blocks))
        prompt_rows += (row + position - first for position in item.scores)
        row = into.stop
        if item.samples:
            logits_rows.append(row - 1)
    return StepInputs(
        token_ids=token_ids,
        positions=positions,
        kv_index=kv_index,
        logits_rows=np.array(logits_rows + prompt_rows, dtype=np.int64),
        spans=tuple(spans),
        segments=_segments(batch, residency),
    )


def _segments(batch: list[Scheduled], residency: Residency) -> Mapping[str, tuple[Segment, ...]]:
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
