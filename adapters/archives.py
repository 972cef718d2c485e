"""Reads zip and tar without trust: entries one by one, every byte counted as it is unpacked, headers bounded.

Knows nothing of which entries are wanted.
"""

from __future__ import annotations

import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Literal, Protocol

from adapters.errors import AdapterError

CHUNK = 1024 * 1024
RATIO = 100  # uncompressed to compressed: trained weights hardly compress, a bomb does
RATIO_FREE = 1024 * 1024  # any archive may unpack to this much
HEADERS = 1024 * 1024  # bytes of a zip's directory, or of a tar's headers between two files

_END = b"PK\x05\x06"  # a zip's end record: 22 bytes and a comment
_END_64 = b"PK\x06\x06"
_END_64_LOCATOR = b"PK\x06\x07"


class Reader(Protocol):
    """What bytes are taken from."""

    def read(self, size: int = -1, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """One entry of an archive; `open` is good until the next one is asked for."""

    name: str
    kind: Literal["file", "folder", "other"]
    open: Callable[[], Reader]


class Budget:
    """How much an archive of a given size may unpack to."""

    def __init__(self, archive_bytes: int, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._ratio_bytes = max(RATIO * archive_bytes, RATIO_FREE)
        self._spent = 0
        if archive_bytes > max_bytes:
            raise _too_large(f"the archive has {archive_bytes} bytes, the bound is {max_bytes}")

    def spend(self, count: int) -> None:
        """Count unpacked bytes."""
        self._spent += count
        if self._spent > self._max_bytes:
            raise _too_large(f"the archive unpacks to more than the bound of {self._max_bytes} bytes")
        if self._spent > self._ratio_bytes:
            problem = f"the archive unpacks to more than {RATIO} times its size, as no adapter does"
            raise AdapterError("invalid_archive", problem)


class Metered:
    """A reader that counts what passes. With a `horizon` it also refuses to pass that position."""

    def __init__(self, source: Reader, budget: Budget) -> None:
        self.horizon: int | None = None
        self._source = source
        self._budget = budget
        self._position = 0

    def read(self, size: int = -1, /) -> bytes:
        chunk = self._source.read(size)
        self._position += len(chunk)
        self._budget.spend(len(chunk))
        if self.horizon is not None and self._position > self.horizon:
            raise tarfile.ReadError(f"more than {HEADERS} bytes of headers")
        return chunk


def zip_entries(file: IO[bytes], budget: Budget) -> Iterator[ArchiveEntry]:
    """The entries of a zip, stored or deflated."""
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            form = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                kind: Literal["file", "folder", "other"] = "folder"
            else:
                kind = "file" if form in (0, stat.S_IFREG) else "other"
            yield ArchiveEntry(info.filename, kind, _zip_opener(archive, info, budget))


def tar_entries(source: Reader, budget: Budget) -> Iterator[ArchiveEntry]:
    """The entries of a tar, read once from front to end, and past it: so a gzip's checksum is seen."""
    stream = Metered(source, budget)
    stream.horizon = HEADERS
    with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
        while (info := archive.next()) is not None:
            stream.horizon = info.offset_data + (info.size if info.isreg() else 0) + HEADERS
            plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            kind: Literal["file", "folder", "other"] = (
                "file" if plain else "folder" if info.isdir() else "other"
            )
            yield ArchiveEntry(info.name, kind, _tar_opener(archive, info))
    stream.horizon = None
    while stream.read(CHUNK):
        pass


def _zip_opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo, budget: Budget) -> Callable[[], Reader]:
    def open_entry() -> Reader:
        if info.header_offset < 0:
            raise zipfile.BadZipFile(f"{info.filename!r} lies before the archive")
        if info.flag_bits & 1:
            raise _unread(info, "is encrypted; make the archive without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _unread(info, "is neither stored nor deflated; make the archive with zip's own compression")
        return Metered(archive.open(info), budget)

    return open_entry


def _tar_opener(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Callable[[], Reader]:
    def open_entry() -> Reader:
        reader = archive.extractfile(info)
        assert reader is not None, "a regular file has a reader"
        return reader

    return open_entry


def _check_directory(file: IO[bytes]) -> None:
    """Bound a zip's directory, which the library reads as a whole. It finds the end records the same way."""
    size = file.seek(0, 2)
    start = max(0, size - 22 - 65535)
    file.seek(start)
    tail = file.read()
    place = len(tail) - 22
    if place < 0 or tail[place : place + 4] != _END or tail[-2:] != b"\0\0":
        place = tail.rfind(_END)
    if place < 0 or len(tail) - place < 22:
        raise zipfile.BadZipFile("it has no end record")
    sizes = [int.from_bytes(tail[place + 12 : place + 16], "little"), *_zip64_sizes(file, start + place)]
    known = [size for size in sizes if size != 0xFFFFFFFF] or sizes  # all ones: the zip64 record says it
    if max(known) > HEADERS:
        raise zipfile.BadZipFile(f"its directory has more than {HEADERS} bytes")
    file.seek(0)


def _zip64_sizes(file: IO[bytes], end: int) -> list[int]:
    """What a zip64's record says of the directory's size, wherever a reader may look for the record."""
    file.seek(max(0, end - 20))
    locator = file.read(min(20, end))
    if locator[:4] != _END_64_LOCATOR:
        return []
    found: list[int] = []
    for position in {end - 20 - 56, int.from_bytes(locator[8:16], "little")}:
        if 0 <= position < end:
            file.seek(position)
            record = file.read(56)
            if record[:4] == _END_64:
                found.append(int.from_bytes(record[40:48], "little"))
    return found


def _unread(info: zipfile.ZipInfo, problem: str) -> AdapterError:
    """A sound entry of a kind that is not unpacked."""
    return AdapterError("invalid_archive", f"{info.filename!r} {problem}")


def _too_large(message: str) -> AdapterError:
    return AdapterError(
        "adapter_upload_too_large", f"{message}; send a smaller adapter, or raise --max-upload-bytes"
    )
