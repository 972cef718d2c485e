"""What every name points at: in memory for the asking, on disk for good, and the moves that keep both.

Knows nothing of who holds a generation, or of how an upload is checked.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from types import MappingProxyType

from adapters.entry import Facts
from adapters.errors import AdapterError, Finding
from adapters.findings import short
from adapters.records import BrokenRecordError, Mover, Record, Target
from adapters.store import Store

Resolved = str | tuple[Finding, ...]  # the generation that serves a name, or why none does


@dataclass(frozen=True, slots=True)
class Held:
    """A name's state."""

    record: Record | None  # None: the name's file is broken, and the facts tell why
    facts: Facts

    @property
    def generation(self) -> str:
        """The present one; "" if unknown."""
        return self.record.generation if self.record else ""

    @property
    def ready(self) -> bool:
        """Whether it can be served."""
        return self.record is not None and not self.facts.findings

    @property
    def resolved(self) -> Resolved:
        """What a request for the name meets."""
        return self.generation if self.ready else self.facts.findings


class Names:
    """One store's names. `lock` guards the memory and is held for moments; changes come one by one.

    `resolved` is the short form that requests read, under the same lock; it changes with the name's state.
    `quota` bounds the bytes of all generations together; a store that is past it at the start is served all the same.
    """

    def __init__(
        self,
        store: Store,
        lock: RLock,
        inspect: Callable[[Path, str], Facts],
        keep_versions: int,
        quota: int | None,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._lock = lock
        self._inspect = inspect
        self._keep_versions = keep_versions
        self._quota = quota
        self._clock = clock
        self._nbytes = 0
        self._unsure: set[str] = set()  # a name's file may still point at these: kept until the next start
        self._stored: dict[str, int] = {}  # generation to its bytes on disk
        for generation in store.generations():
            self._measure(generation)
        self._held = {name: self._recall(name) for name in store.names()}
        self._resolved = {name: held.resolved for name, held in self._held.items()}
        self.resolved: Mapping[str, Resolved] = MappingProxyType(self._resolved)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored generations, each counted once however many names point at it."""
        return self._nbytes

    def all(self) -> list[tuple[str, Held]]:
        """Every name, sorted."""
        with self._lock:
            return sorted(self._held.items(), key=lambda item: item[0])

    def get(self, name: str) -> Held | None:
        """A name's state, if there is such a name."""
        with self._lock:
            return self._held.get(name)

    def known(self, name: str) -> Held:
        """A name's state; AdapterError if there is no such name."""
        if held := self.get(name):
            return held
        raise self.unknown(name)

    def unknown(self, name: str) -> AdapterError:
        """That there is no such name, and which one may be meant: a search that is not done under the lock."""
        with self._lock:
            names = list(self._held)
        near = difflib.get_close_matches(name[:80], names, n=1)
        cure = f"did you mean {near[0]}" if near else f"{len(names)} adapters are known"
        return AdapterError("adapter_not_found", f"no adapter is named {short(name)}; {cure}")

    def expect(self, name: str, if_match: str | None) -> Held | None:
        """A name's state, refused if the caller expected another generation; `*` expects any."""
        held = self.get(name)
        if if_match is None or (held and if_match in ("*", held.generation)):
            return held
        at = f"is at {held.generation or 'a broken state'}" if held else "does not exist"
        problem = f"If-Match expects {if_match[:80]}, but adapter {name} {at}; look at it, then try again"
        raise AdapterError("precondition_failed", problem)

    def points_at(self, generation: str) -> bool:
        """Whether any name is at the generation now."""
        with self._lock:
            return any(held.generation == generation for held in self._held.values())

    def facts(self, generation: str) -> Facts:
        """What a stored generation is worth on this base."""
        return self._inspect(self._store.folder(generation), generation)

    def expect_room(self, name: str, generation: str, nbytes: int, in_use: Set[str]) -> None:
        """Refuse to move the name to a generation that would take the store past its quota.

        Counted is what stays after the move: the versions that it drops make room, unless somebody uses them.
        """
        if self._quota is None or generation in self._stored:
            return
        with self._lock:
            records = {each: held.record for each, held in self._held.items()}
        records[name] = self._moved(name, generation, "client")
        needed = self._needed(records.values(), in_use)
        kept = [size for each, size in self._stored.items() if needed is None or each in needed]
        if sum(kept) + nbytes > self._quota:
            raise AdapterError(
                "store_full",
                f"the adapter store may hold {self._quota} bytes (--adapter-store-bytes); {len(kept)} generations "
                f"that names keep or requests use take {sum(kept)}, and this one would add {nbytes}; delete "
                "adapters, keep fewer versions (--keep-versions), or allow the store more",
            )

    def keep(self, folder: Path, generation: str) -> bool:
        """Store a synced folder; until a name points at it, a sweep may take it. True if a damaged one was put out."""
        try:
            return self._store.keep(folder, generation)
        finally:
            self._measure(generation)

    def move(self, name: str, generation: str, facts: Facts, mover: Mover) -> None:
        """Point the name at a stored generation, on disk first."""
        record = self._moved(name, generation, mover)
        try:
            self._store.write(name, record)
        except OSError:
            self._restore(name, generation)
            raise
        self._set(name, Held(record, facts))

    def remove(self, name: str) -> None:
        """Forget the name, on disk first."""
        try:
            self._store.remove(name)
        except OSError:
            self._restore(name, self.known(name).generation)
            raise
        self._set(name, None)

    def sweep(self, in_use: Callable[[], Set[str]]) -> None:
        """Drop what no name's history has and nobody uses. What fails is left to the next sweep.

        A name whose file is broken may need any generation: while there is one, nothing is dropped.
        """
        with self._lock:
            records = [held.record for held in self._held.values()]
            needed = self._needed(records, in_use())
        for generation in set(self._stored) - needed if needed is not None else ():
            with suppress(OSError):
                self._store.drop(generation)
            self._measure(generation)

    def check(self, in_use: Set[str]) -> None:
        """Memory and disk agree, and whatever is pointed at or in use is there."""
        assert set(self._store.names()) == set(self._held), "names differ from the disk's"
        assert self._store.generations() == self._stored.keys(), "generations differ from the disk's"
        for generation, size in self._stored.items():
            assert size == self._store.size(self._store.folder(generation)), f"{generation} is counted amiss"
        assert self._nbytes == sum(self._stored.values()), "the bytes in the store are counted amiss"
        assert in_use <= self._stored.keys(), "a generation in use is not on disk"
        resolved = {name: held.resolved for name, held in self._held.items()}
        assert self._resolved == resolved, "requests meet another state than the names have"
        assert all(resolved.values()), "a name is refused without a reason"
        for name, held in self._held.items():
            if held.record is None:
                continue
            assert self._store.read(name) == held.record, f"{name} differs from the disk's"
            revisions = [version.revision for version in (*held.record.history, held.record.version)]
            assert revisions == sorted(set(revisions)), f"revisions of {name} do not grow"
            assert not held.ready or held.generation in self._stored, f"{name} points at nothing"

    def _moved(self, name: str, generation: str, mover: Mover) -> Record:
        """What the name's record would be after a move."""
        held, now = self.get(name), int(self._clock())
        if held and held.record:
            return held.record.moved(generation, now, self._keep_versions, mover)
        return Record(1, now, now, (Target(generation),), mover=mover)

    def _needed(self, records: Iterable[Record | None], in_use: Set[str]) -> set[str] | None:
        """What may not be dropped; None, which is everything, if a record is broken."""
        needed = {*self._unsure, *in_use}
        for record in records:
            if record is None:
                return None
            needed |= record.generations()
        return needed

    def _measure(self, generation: str) -> None:
        """Take over what the disk has of a generation, after anything was done there."""
        folder = self._store.folder(generation)
        self._nbytes -= self._stored.pop(generation, 0)
        if folder.exists():
            self._stored[generation] = self._store.size(folder)
            self._nbytes += self._stored[generation]

    def _set(self, name: str, held: Held | None) -> None:
        """Change a name's state, or forget it, in both forms at once."""
        with self._lock:
            if held is None:
                del self._held[name], self._resolved[name]
            else:
                self._held[name], self._resolved[name] = held, held.resolved

    def _recall(self, name: str) -> Held:
        """A name as the last run left it. One that cannot be served is kept, with what is wrong."""
        try:
            record = self._store.read(name)
        except BrokenRecordError as error:
            cure = "put or delete the name; until then no unused generation is removed"
            return Held(None, Facts(findings=(Finding(f"names/{name}.json", str(error), cure),)))
        return Held(record, self.facts(record.generation))

    def _restore(self, name: str, generation: str) -> None:
        """After a failed change the disk may have it or not: make it what memory goes on with."""
        held = self.get(name)
        try:
            if held is None:
                self._store.remove(name)
            elif held.record and not self._is_written(name, held.record):
                self._store.write(name, held.record)
        except OSError:
            self._unsure.add(generation)

    def _is_written(self, name: str, record: Record) -> bool:
        try:
            return self._store.read(name) == record
        except BrokenRecordError:
            return False
