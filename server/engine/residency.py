"""Brings a sequence's adapter to the device before it runs, and keeps it there while it does.

The engine's only way to adapters: asks the loader for host weights, the pool for pages, and owns the pins. Knows
nothing of names: generations only.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from adapters.loader import Loader
from adapters.pool import Pool


class Admission(Enum):
    """The answer to a sequence that wants to run."""

    READY = auto()  # resident and pinned
    LOADING = auto()  # being read from disk; ask again when the loader says so
    NO_ROOM = auto()  # pages are held by running sequences


class Residency:
    """Pins of device pages, one per running sequence."""

    def __init__(self, loader: Loader, pool: Pool) -> None:
        self.loader = loader
        self.pool = pool

    def acquire(self, generation: str | None) -> Admission:
        """Pin a generation's pages if that can be done now; raises `AdapterError` when it cannot be read."""
        if generation is None:
            return Admission.READY
        if not self.pool.resident(generation):
            adapter = self.loader.get(generation)
            if adapter is None:
                return Admission.LOADING
            if not self.pool.admit(adapter):
                return Admission.NO_ROOM
        self.pool.pin(generation)
        return Admission.READY

    def release(self, generation: str | None) -> None:
        """Give back one pin."""
        if generation is not None:
            self.pool.unpin(generation)

    def pages(self, generation: str | None) -> Mapping[str, tuple[int, ...]]:
        """Group to page ids; empty for the base alone."""
        return {} if generation is None else self.pool.pages(generation)
