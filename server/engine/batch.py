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
    token_ids, positions, kv_index = [], [], []
    spans: list[Span] = []
    logits_rows: list[int] = []
    prompt_rows: list[int] = []
    row = 0
    for item in batch:
        sequence, count = item.sequence, item.count
        end = sequence.computed + count
        at = np.arange(sequence.computed, end)
        blocks = np.asarray(sequence.blocks, dtype=np.int64)
        token_ids.append(np.asarray(sequence.tokens[sequence.computed : end], dtype=np.int64))
        positions.append(at)
        kv_index.append(blocks[at // block_size] * block_size + at % block_size)
        spans.append(Span(row, row + count, end, tuple(sequence.blocks)))
        prompt_rows += (row + position - sequence.computed for position in item.scores)
        row += count
        if item.samples:
            logits_rows.append(row - 1)
    return StepInputs(
        token_ids=np.concatenate(token_ids),
        positions=np.concatenate(positions),
        kv_index=np.concatenate(kv_index),
        logits_rows=np.asarray(logits_rows + prompt_rows, dtype=np.int64),
        spans=tuple(spans),
        segments=_segments(batch, residency),
    )


def _segments(batch: list[Scheduled], residency: Residency) -> Mapping[str, tuple[Segment, ...]]:
    tables = [residency.pages(item.sequence.generation) for item in batch]
    groups = {group for table in tables for group in table}
    return {
        group: segments_of(
            [
                (item.count, table.get(group, ()), (1.0,) * len(table.get(group, ())))
                for item, table in zip(batch, tables, strict=True)
            ]
        )
        for group in groups
    }
