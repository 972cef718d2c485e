"""A peft folder as a tar that is made while it is read: its length is known before its first byte, and no copy is kept.

Knows nothing of where the bytes go.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters.archives import CHUNK
from adapters.errors import AdapterError
from adapters.sources import folder_files

_END = bytes(2 * tarfile.BLOCKSIZE)
_MAGICS = (b"PK\x03\x04", b"\x1f\x8b")  # zip, gzip; a tar says it is one at 257


@dataclass(frozen=True, slots=True)
class Packed:
    """What to send: some files, each after a header of its own (empty for a file that is an archive itself)."""

    parts: tuple[tuple[bytes, Path, int], ...]  # header, file, its size
    end: bytes = b""

    def __len__(self) -> int:
        whole = sum(len(header) + size + _padding(header, size) for header, _, size in self.parts)
        return whole + len(self.end)

    def __iter__(self) -> Iterator[bytes]:
        """The bytes; raises `AdapterError` when a file is no longer as long as it was."""
        for header, path, size in self.parts:
            if header:
                yield header
            yield from _read(path, size)
            if padding := _padding(header, size):
                yield bytes(padding)
        if self.end:
            yield self.end


def pack(path: Path) -> Packed:
    """A peft folder's two files as a tar, or a file that is a zip, tar or tar.gz already as it is."""
    if path.is_file():
        _check_archive(path)
        return Packed(((b"", path, path.stat().st_size),))
    parts = []
    for file in folder_files(path):
        info = tarfile.TarInfo(file.name)
        info.size = file.stat().st_size
        parts.append((info.tobuf(tarfile.GNU_FORMAT), file, info.size))
    return Packed(tuple(parts), _END)


def _padding(header: bytes, size: int) -> int:
    return -size % tarfile.BLOCKSIZE if header else 0


def _read(path: Path, size: int) -> Iterator[bytes]:
    left = size
    with path.open("rb") as file:
        while left and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk
        if left or file.read(1):
            raise AdapterError(
                "invalid_adapter", f"{path} was written to while it was sent; wait until its writer is done"
            )


def _check_archive(path: Path) -> None:
    """What is no archive is told apart here, before gigabytes have been sent for nothing."""
    with path.open("rb") as file:
        head = file.read(262)
    if not head.startswith(_MAGICS) and head[257:262] != b"ustar":
        raise AdapterError(
            "invalid_archive",
            f"{path} is not a zip, tar or tar.gz; name the folder that holds adapter_config.json and "
            "adapter_model.safetensors, or an archive of the two",
        )
