"""Which rows of a step read which adapter pages: plain host data, built once per step, read by every layer.

A segment is a run of consecutive tokens with the same adapter set. Page ids are valid in all sites of one group, so
a step has one list of segments per group. Knows nothing of adapters' names, of sequences or of the pool's owner.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start:end` add the pages' deltas, each with its weight (1.0, or a share in a blend)."""

    start: int
    end: int
    pages: tuple[int, ...]
    weights: tuple[float, ...]


def segments_of(rows: list[tuple[int, tuple[int, ...], tuple[float, ...]]]) -> tuple[Segment, ...]:
    """Join neighbours with equal pages and weights into segments.

    `rows` holds (token count, pages, weights) in row order; empty pages (no adapter, or one that does not target
    the group) leave their rows out.
    """
    found: list[Segment] = []
    start = 0
    for count, pages, weights in rows:
        end = start + count
        last = found[-1] if found else None
        if last and last.end == start and (last.pages, last.weights) == (pages, weights):
            found[-1] = Segment(last.start, end, pages, weights)
        elif pages:
            found.append(Segment(start, end, pages, weights))
        start = end
    return tuple(found)
