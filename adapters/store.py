"""Adapters on disk: contents by their hash, names as small pointers, in an order that survives a crash.

    <root>/lock                       names the server that uses the store
    <root>/incoming/<anything>        work in progress; whatever a crash left is removed at start
    <root>/generations/<sha256>/      adapter_config.json and adapter_model.safetensors, byte for byte as sent
    <root>/names/<name>.json          {schema, revision, created, updated, targets, history, mover}

A generation's files are on disk before its folder has its name, and that before any name points at it.
Knows nothing of what an adapter is, or of who uses one.
"""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

from adapters.files import CHUNK, FileOps
from adapters.lock import StoreLock
from adapters.records import GENERATION, NAME, BrokenRecordError, Record, dump_record, parse_record

FILES = ("adapter_config.json", "adapter_model.safetensors")


def hash_folder(folder: Path) -> str:
    """The generation of a folder's two files.

    sha256 over a frame per file, config first: the length of its name in 8 bytes, its name, the length of its
    content in 8 bytes, its content. Lengths are little-endian. So no two different pairs share a frame.
    """
    digest = hashlib.sha256()
    for name in FILES:
        path = folder / name
        digest.update(len(name).to_bytes(8, "little") + name.encode())
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


class Store:
    """The folder and its lock. Reads go to the files at once; every change goes through `files`."""

    def __init__(self, root: Path, files: FileOps) -> None:
        self.root = root
        self.files = files
        self._incoming = root / "incoming"
        self._generations = root / "generations"
        self._names = root / "names"
        files.mkdir(root)
        self._lock = StoreLock(root / "lock")
        try:
            for folder in (self._incoming, self._generations, self._names):
                files.mkdir(folder)
            for name in files.names(self._incoming):
                files.remove_tree(self._incoming / name)
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Let another server have the store."""
        self._lock.release()

    def incoming(self) -> Path:
        """A fresh folder for work in progress; whoever asked removes it with `discard`."""
        path = self._incoming / uuid.uuid4().hex
        self.files.mkdir(path)
        return path

    def discard(self, folder: Path) -> None:
        """Remove work in progress. What cannot be removed now goes at the next start."""
        try:
            self.files.remove_tree(folder)
        except OSError:
            return

    def folder(self, generation: str) -> Path:
        """Where a generation's two files are."""
        assert GENERATION.fullmatch(generation), generation
        return self._generations / generation

    def size(self, folder: Path) -> int:
        """Bytes of a folder's two files, or of what is left of them."""
        paths = [folder / name for name in FILES]
        return sum(path.stat().st_size for path in paths if path.exists())

    def sync(self, folder: Path) -> None:
        """Put an incoming folder's two files on disk, never to be written again: the slow half of `keep`."""
        for name in FILES:
            self.files.protect(folder / name)
            self.files.sync_file(folder / name)
        self.files.sync_folder(folder)

    def intact(self, generation: str) -> bool:
        """Whether a generation's files are there and are what was sent. Reads them whole: 0.2 s for 168 MB."""
        try:
            return hash_folder(self.folder(generation)) == generation
        except OSError:
            return False

    def keep(self, folder: Path, generation: str) -> bool:
        """Give a synced incoming folder its place, by renaming it. True if a damaged one was put out for it."""
        place = self.folder(generation)
        damaged = place.exists() and not self.intact(generation)
        if damaged:
            self.drop(generation)
        if not place.exists():
            self.files.replace(folder, place)
        self.files.sync_folder(self._generations)
        return damaged

    def drop(self, generation: str) -> None:
        """Remove a generation: out of its place first, so that no half of one is ever found there."""
        trash = self._incoming / uuid.uuid4().hex
        self.files.replace(self.folder(generation), trash)
        self.discard(trash)

    def generations(self) -> set[str]:
        """All that are on disk."""
        return {name for name in self.files.names(self._generations) if GENERATION.fullmatch(name)}

    def names(self) -> list[str]:
        """All names that have a file, sorted."""
        found = [
            name.removesuffix(".json") for name in self.files.names(self._names) if name.endswith(".json")
        ]
        return [name for name in found if NAME.fullmatch(name)]

    def read(self, name: str) -> Record:
        """What a name's file says; BrokenRecordError if it cannot be used."""
        try:
            return parse_record(self._file(name).read_bytes())
        except OSError as error:
            raise BrokenRecordError(f"it cannot be read: {error.strerror or error}") from error

    def write(self, name: str, record: Record) -> None:
        """Move a name, atomically and for good."""
        temporary = self._incoming / f"{uuid.uuid4().hex}.json"
        try:
            self.files.write(temporary, [dump_record(record)])
            self.files.sync_file(temporary)
            self.files.replace(temporary, self._file(name))
        except OSError:
            self.discard(temporary)
            raise
        self.files.sync_folder(self._names)

    def remove(self, name: str) -> None:
        """Remove a name, for good."""
        self.files.unlink(self._file(name))
        self.files.sync_folder(self._names)

    def _file(self, name: str) -> Path:
        assert NAME.fullmatch(name), name
        return self._names / f"{name}.json"
