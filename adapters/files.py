"""The file operations of the store as one small object: tests pass another, whose disks fill up.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

CHUNK = 1024 * 1024


class FileOps:
    """Every change that the store makes on disk is one of these calls."""

    def mkdir(self, path: Path) -> None:
        """Make a folder and its parents; one that exists is kept."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Write a new file."""
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file's bytes into a new file."""
        with source.open("rb") as reader, target.open("xb") as writer:
            shutil.copyfileobj(reader, writer, CHUNK)

    def protect(self, path: Path) -> None:
        """Let nobody write to a file that is done, where the file system can say so."""
        with suppress(PermissionError, NotImplementedError):
            path.chmod(0o444)

    def sync_file(self, path: Path) -> None:
        """Wait until a file's bytes are on disk."""
        _sync(path, os.O_RDONLY)

    def sync_folder(self, path: Path) -> None:
        """Wait until a folder's entries are on disk."""
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def replace(self, source: Path, target: Path) -> None:
        """Rename a file over another, or a folder to a free name."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file; one that is gone already is fine."""
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a file or a folder with all it holds; one that is gone already is fine."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def names(self, path: Path) -> list[str]:
        """What a folder holds, sorted."""
        return sorted(os.listdir(path))


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
