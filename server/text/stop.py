"""Stop strings: where a text ends, found while it arrives in pieces.

Knows nothing of tokens or of sequences: text goes in, text that may be shown comes out.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Cuts a growing text before the first stop string in it.

    First means completed first, and of two completed by the same character the longer one: so the cut does
    not depend on how the text was divided into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Take the next piece; return what may be shown now. Once `matched` is set nothing more is."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            _, start, self.matched = min(hits)
            self._held = ""
            return text[:start]
        shown = len(text) - self._undecided(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text has ended: what was held back is no stop string after all."""
        rest, self._held = self._held, ""
        return rest

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
