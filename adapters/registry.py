"""Names and who uses them: a name resolves to a generation, moves atomically, and keeps its history.

Knows nothing of HTTP, of host memory or of the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock, RLock
from typing import TYPE_CHECKING

from adapters.entry import Entry, Facts, Put
from adapters.errors import AdapterError, Finding, full_disk_named
from adapters.names import Held, Names
from adapters.records import Mover, Version, check_name
from adapters.references import Reference, References
from adapters.sources import copy_folder, gather, unpack
from adapters.store import Store, hash_folder

if TYPE_CHECKING:
    from adapters.adapter import Adapter
    from adapters.appraiser import Appraiser

DEFAULT_MAX_BYTES = 2 * 1024**3
DEFAULT_KEEP_VERSIONS = 5


class Registry:
    """Every name of one store, for one base.

    One lock guards the names in memory and is held for moments: `resolve` and `release` never wait for a disk.
    Changes take turns behind a second one, since a disk is slow; an upload is checked before its turn.

    `appraiser` says what an adapter is worth on the base. `quota` bounds the bytes of the stored generations.
    `on_stale` is told of a generation whose copies in memory are of no more use, maybe more than once: no name points
    at it and nobody holds it, or its files were damaged and have been sent again.
    """

    def __init__(
        self,
        store: Store,
        appraiser: Appraiser,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        keep_versions: int = DEFAULT_KEEP_VERSIONS,
        quota: int | None = None,
        on_stale: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self._appraiser = appraiser
        self._max_bytes = max_bytes
        self._on_stale = on_stale
        self._uploaded = 0
        self._lock = RLock()
        self._writing = Lock()
        self._references = References(self._unheld)
        self._names = Names(store, self._lock, self._appraiser.inspect, keep_versions, quota, clock)
        self._resolved = self._names.resolved  # read here, written there
        self.sweep()

    @property
    def stored_bytes(self) -> int:
        """What all generations take on disk."""
        return self._names.nbytes

    @property
    def uploaded_bytes(self) -> int:
        """What all puts that moved a name have brought since the start."""
        return self._uploaded

    def put_archive(self, name: str, archive: Path, if_match: str | None = None) -> Put:
        """Check an uploaded archive to the last value, store it, and move the name to it."""
        return self._put(
            name, if_match, lambda into: unpack(archive, into, self._max_bytes, self.store.files)
        )

    def put_parts(self, name: str, parts: Sequence[tuple[str, Path]], if_match: str | None = None) -> Put:
        """The same for the files themselves, each with the name it was sent under."""
        return self._put(name, if_match, lambda into: gather(parts, into, self.store.files))

    def put_folder(
        self, name: str, folder: Path, if_match: str | None = None, mover: Mover = "client"
    ) -> Put:
        """The same for a folder on this machine."""
        return self._put(name, if_match, lambda into: copy_folder(folder, into, self.store.files), mover)

    def resolve(self, name: str, key: str | None = None) -> Reference:
        """Hold the generation that the name points at. `key` will choose among several targets."""
        with self._lock:  # no sweep comes between the look and the hold
            found = self._resolved.get(name)
            if isinstance(found, str):
                return self._references.hold(name, found)
        if found is None:
            raise self._names.unknown(name)
        problem = (
            f"adapter {name} is stored, and this base cannot serve it; upload one that fits, or remove it"
        )
        raise AdapterError("adapter_incompatible", problem, found)

    def read(self, generation: str) -> Adapter:
        """The weights of a stored generation, if its files are what was sent: what a Loader reads with."""
        folder, cure = self.store.folder(generation), "send them again"
        try:  # the hash first: a page that cannot be had is an error there, and the process's end once it is mapped
            if hash_folder(folder) == generation:
                return self._appraiser.read(folder, generation)
            findings: tuple[Finding, ...] = (
                Finding(generation, "the stored bytes are not those that were sent", cure),
            )
        except AdapterError as error:
            findings = error.findings
        except OSError as error:
            findings = (Finding(generation, f"its files cannot be read: {error.strerror}", cure),)
        raise AdapterError("adapter_load_failed", f"generation {generation} could not be read back", findings)

    def __contains__(self, name: str) -> bool:
        return self._names.get(name) is not None

    def entries(self) -> list[Entry]:
        """All names, sorted."""
        return [self._entry(name, held) for name, held in self._names.all()]

    def entry(self, name: str) -> Entry:
        """One name."""
        return self._entry(name, self._names.known(name))

    def versions(self, name: str) -> list[Version]:
        """The present version and those that `rollback` can return to, newest first."""
        record = self._names.known(name).record
        return [record.version, *reversed(record.history)] if record else []

    @full_disk_named()
    def rollback(self, name: str, to: int | str, if_match: str | None = None) -> Entry:
        """Move the name, as a new revision, to an earlier one of its history: a revision or a generation."""
        with self._writing:
            self._names.expect(name, if_match)
            versions = self.versions(name)
            found = [version for version in versions if to in (version.revision, version.generation)]
            if not found:
                kept = ", ".join(str(version.revision) for version in versions) or "none"
                raise AdapterError("adapter_not_found", f"adapter {name} has no version {to}; it has {kept}")
            before, after = versions[0].generation, found[0].generation
            if after != before:
                facts = self._names.facts(after)
                if facts.findings:
                    problem = f"version {to} of adapter {name} cannot be served on this base"
                    raise AdapterError("adapter_incompatible", problem, facts.findings)
                if not self.store.intact(after):
                    problem = f"version {to} of adapter {name} is damaged in the store; send its files again"
                    raise AdapterError("adapter_load_failed", problem)
                self._change(lambda: self._names.move(name, after, facts, "client"))
            entry = self.entry(name)
        self._tell(before)
        return entry

    @full_disk_named()
    def delete(self, name: str, if_match: str | None = None) -> None:
        """Remove a name. Requests that hold its generation go on."""
        with self._writing:
            self._names.expect(name, if_match)
            held = self._names.known(name)
            self._change(lambda: self._names.remove(name))
        self._tell(held.generation)

    def sweep(self) -> None:
        """Remove from disk what no name's history has and nobody holds; every change does it too."""
        with self._writing:
            self._names.sweep(self._references.held)

    def check(self) -> None:
        """Memory and disk agree, and whatever is held or pointed at is there."""
        with self._writing, self._lock:
            self._references.check()
            self._names.check(self._references.held())

    @full_disk_named()
    def _put(
        self, name: str, if_match: str | None, fetch: Callable[[Path], None], mover: Mover = "client"
    ) -> Put:
        check_name(name)
        self._names.expect(name, if_match)
        folder = self.store.incoming()
        try:
            fetch(folder)
            generation = hash_folder(folder)
            held = self._names.get(name)  # as it is now: while the disk is read, the name may be deleted
            if held and held.resolved == generation and self.store.intact(generation):
                return Put(self._entry(name, held), created=False)
            nbytes = self.store.size(folder)
            with self._writing:  # before the slow part, and again when it is this upload's turn
                self._names.expect_room(name, generation, nbytes, self._references.held())
            facts = self._appraiser.validate(folder, generation)
            self.store.sync(folder)
            with self._writing:
                before = self._names.expect(name, if_match)
                created = not self._is_at(name, generation)
                self._names.expect_room(name, generation, nbytes, self._references.held())
                self._change(lambda: self._keep(name, folder, generation, facts, mover))
                self._uploaded += nbytes if created else 0
                entry = self.entry(name)
        finally:
            self.store.discard(folder)
        if before:
            self._tell(before.generation)
        return Put(entry, created)

    def _keep(self, name: str, folder: Path, generation: str, facts: Facts, mover: Mover) -> None:
        """Store the folder, and move the name there if it is elsewhere."""
        if self._names.keep(folder, generation) and self._on_stale:
            self._on_stale(generation)
        if not self._is_at(name, generation):
            self._names.move(name, generation, facts, mover)

    def _change(self, change: Callable[[], None]) -> None:
        """Do it, and clean up after it, also where it failed half-way; the turn is ours."""
        try:
            change()
        finally:
            self._names.sweep(self._references.held)

    def _is_at(self, name: str, generation: str) -> bool:
        held = self._names.get(name)
        return held is not None and held.resolved == generation

    def _unheld(self, last: Reference) -> None:
        """Nobody holds the generation any more; mostly its name is still at it, and that is all."""
        with self._lock:
            if self._resolved.get(last.name) == last.generation:
                return
        self._tell(last.generation)

    def _tell(self, generation: str) -> None:
        """Call the hook if no name points at the generation and nobody holds it."""
        with self._lock:
            used = self._references.count(generation) > 0 or self._names.points_at(generation)
        if generation and not used and self._on_stale:
            self._on_stale(generation)

    def _entry(self, name: str, held: Held) -> Entry:
        record, facts = held.record, held.facts
        return Entry(
            name=name,
            generation=held.generation,
            revision=record.revision if record else 0,
            created=record.created if record else 0,
            updated=record.updated if record else 0,
            nbytes=facts.nbytes,
            rank=facts.rank,
            modules=facts.modules,
            base_model=facts.base_model,
            state="ready" if held.ready else "incompatible",
            references=self._references.count(held.generation),
            findings=facts.findings,
            mover=record.mover if record else None,
        )
