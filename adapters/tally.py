"""A histogram of seconds that costs one thread nothing to keep: no lock, no labels.

Written by one thread at a time and read by any; a reader may miss the newest value. Knows nothing of metrics' names.
"""

from __future__ import annotations

from bisect import bisect_left

BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Tally:
    """How many values fell under each bound, and their sum."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    @property
    def count(self) -> int:
        """Values so far."""
        return sum(self._counts)

    @property
    def total(self) -> float:
        """Their sum."""
        return self._total

    def add(self, value: float) -> None:
        """One more value; a bound belongs to what is below it."""
        self._counts[bisect_left(BOUNDS, value)] += 1
        self._total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(bound, values up to it), the last bound being +Inf, as Prometheus has them."""
        found: list[tuple[str, float]] = []
        so_far = 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self._counts, strict=True):
            so_far += count
            found.append((bound, so_far))
        return found
