"""Turns scheduled sequences into the flattened rows of one step. Knows nothing of devices or of sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

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
        blocks = np.array(sequence.blocks, dtype=np.int32)
        at = np.arange(first, end)
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
    tables = [residency.pages(item.sequence.generation) for item in batch]
    if not any(tables):
        return {}
    rows: dict[str, list[tuple[int, tuple[int, ...], tuple[float, ...]]]] = {
        group: [] for table in tables for group in table
    }
    for item, table in zip(batch, tables, strict=True):
        for group, found in rows.items():
            pages = table.get(group, ())
            found.append((item.count, pages, (1.0,) * len(pages)))
    return {group: segments_of(found) for group, found in rows.items()}
