"""Who holds which generation: every reference that was given out and has not come back.

Knows nothing of where a name points now, or of disks.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import TracebackType


class Reference:
    """A hold on one generation: whatever happens to the name, its files stay until `release`.

    `release` may be called more than once and from any thread; leaving a `with` calls it.
    """

    __slots__ = ("_release", "generation", "name")

    def __init__(self, name: str, generation: str, release: Callable[[Reference], None]) -> None:
        self.name = name
        self.generation = generation
        self._release = release

    def release(self) -> None:
        """Let go."""
        self._release(self)

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class References:
    """References by generation, behind a lock of their own that is never held while another is taken.

    `on_last` is given the reference whose release left its generation unheld, on the releasing thread.
    """

    def __init__(self, on_last: Callable[[Reference], None]) -> None:
        self._on_last = on_last
        self._lock = Lock()
        self._held: dict[str, set[Reference]] = {}

    def hold(self, name: str, generation: str) -> Reference:
        """A new reference; `name` is what it was asked for by."""
        reference = Reference(name, generation, self.release)
        with self._lock:
            self._held.setdefault(generation, set()).add(reference)
        return reference

    def release(self, reference: Reference) -> None:
        """Take a reference back; one that came back before is left alone."""
        with self._lock:
            holders = self._held.get(reference.generation, set())
            if reference not in holders:
                return
            holders.remove(reference)
            if holders:
                return
            del self._held[reference.generation]
        self._on_last(reference)

    def count(self, generation: str) -> int:
        """How many hold the generation."""
        with self._lock:
            return len(self._held.get(generation, ()))

    def held(self) -> frozenset[str]:
        """The generations that anybody holds."""
        with self._lock:
            return frozenset(self._held)

    def check(self) -> None:
        """Every reference is filed under its generation, and no generation is kept without one."""
        with self._lock:
            for generation, holders in self._held.items():
                assert holders, f"{generation} is kept without a reference"
                assert all(reference.generation == generation for reference in holders), "filed amiss"
