"""Steps that stand for others while nobody asks for any yet: a graph's, and those that need every kernel there is.

They read and write the padding block and an adapter's first page alone. Knows nothing of who runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kernels.plans import FEW_ROWS, GRANULE, LEAST_SHARE
from kernels.segments import Segment, Span
from kernels.tiles import CROSSOVER_ROWS
from server.model.kv_cache import PADDING_BLOCK
from server.model.runner import StepInputs

# The least of each number of rows that kernels tell apart. A product is compiled for one row, and for each number of
# tiles that it has up to `CROSSOVER_ROWS`, of which the lowest, float32's, are a granule high. Beyond, deltas are
# added afterwards (and the product of batch-invariant kernels ends with a single row), beyond `FEW_ROWS` in high tiles.
_LEAST_ROWS = (1, 2, *range(1 + GRANULE, CROSSOVER_ROWS + 2, GRANULE), FEW_ROWS + 1)


def stand_in(
    lengths: Sequence[int],  # rows of each text, which are its last
    wanted: int,  # rows whose logits are asked for, from the first on
    *,
    groups: Iterable[str],
    pages: int,  # of every text's adapter; 0: none has one
    block_size: int,
    least: int = 0,  # keys of each text
) -> StepInputs:
    """A step of texts, each with an adapter of its own, and read from its start unless more keys are wanted."""
    rows = sum(lengths)
    zeros = np.zeros(rows, np.int64)
    starts = (np.cumsum(lengths) - lengths).tolist()
    spans = [
        Span(start, start + length, keys, (PADDING_BLOCK,) * -(-keys // block_size))
        for start, length in zip(starts, lengths, strict=True)
        for keys in (max(length, least),)
    ]
    segments = tuple(Segment(span.start, span.end, (0,) * pages, (1.0,) * pages) for span in spans)
    return StepInputs(
        token_ids=zeros,
        positions=zeros,
        kv_index=zeros + PADDING_BLOCK * block_size,
        logits_rows=np.arange(wanted),
        spans=tuple(spans),
        segments=dict.fromkeys(groups, segments) if pages else {},
    )


def of_every_kind(
    *,
    sequences: int,  # of a step, at most
    tokens: int,  # of a step, at most
    pages: int,  # of a segment, at most
    groups: Iterable[str],
    block_size: int,
) -> list[StepInputs]:
    """Steps that between them need every kernel that any other could, the largest first.

    Beside how many rows there are, kernels differ by whether keys or inputs are shared out among programs: keys of one
    text of some length are, and not those of two tokens or of nothing but single tokens; inputs of few texts are, and
    not those of as many as there can be.
    """
    names = list(groups)
    most = [([1] * min(sequences, tokens), pages, 0)]
    if tokens > 1:  # in one step with a prompt tiles are higher
        others = min(sequences, tokens - 1) - 1
        most.insert(0, ([tokens - others, *[1] * others], pages, 0))
        most.append(([2], 0, 0))
    few = [
        ([rows], held, 2 * LEAST_SHARE if rows <= 2 else 0)
        for rows in reversed(_LEAST_ROWS)
        if rows <= tokens
        for held in range(min(pages, 1), -1, -1)
    ]
    return [
        stand_in(lengths, 1, groups=names, pages=held, block_size=block_size, least=keys)
        for lengths, held, keys in (*most, *few)
    ]
