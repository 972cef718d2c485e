"""Turns scheduled sequences into the flattened rows of one step. Knows nothing of devices or of sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from kernels.segments import FlatSpans, Segment, segments_of
from server.engine.scheduler import Residency, Scheduled
from server.model.runner import StepInputs

Segments = Mapping[str, tuple[Segment, ...]]


def in_row_order(batch: Iterable[Scheduled]) -> list[Scheduled]:
    """Equal adapters side by side, so that each is one segment."""
    return sorted(batch, key=lambda item: item.sequence.generation or "")


def build(batch: list[Scheduled], residency: Residency, block_size: int) -> StepInputs:
    """The step's rows, in the order of `batch`.

    Logits are asked for where a sequence reaches its newest token, and after all those for rows of prompts.
    """
    counts = np.array([item.count for item in batch], dtype=np.int64)
    first = np.array([item.sequence.computed for item in batch], dtype=np.int64)
    ends = np.cumsum(counts)
    starts = ends - counts
    positions = np.arange(ends[-1]) + np.repeat(first - starts, counts)
    spans = _spans(batch, starts, ends, first + counts)
    token_ids = np.empty(len(positions), dtype=np.int64)
    for item, start, end, at in zip(batch, starts.tolist(), ends.tolist(), first.tolist(), strict=True):
        token_ids[start:end] = item.sequence.tokens[at : at + item.count]
    drawn = [end - 1 for item, end in zip(batch, ends.tolist(), strict=True) if item.samples]
    scored = [
        start + position - at
        for item, start, at in zip(batch, starts.tolist(), first.tolist(), strict=True)
        for position in item.scores
    ]
    return StepInputs(
        token_ids=token_ids,
        positions=positions,
        kv_index=_kv_index(spans, np.repeat(spans.table[:, 3], counts), positions, block_size),
        logits_rows=np.array(drawn + scored, dtype=np.int64),
        spans=spans,
        segments=_segments(batch, residency),
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
    held = spans.blocks[first_block + positions // block_size].astype(np.int64)
    return held * block_size + positions % block_size


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
