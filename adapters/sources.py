"""Where an adapter's two files come from: an archive that nobody vouches for, or a folder of the operator's.

Only two base names are ever written, flat, and never a path from inside an archive; other files are neither
opened nor written. Knows nothing of what the files hold, nor of an archive's format.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import IO

from adapters.archives import CHUNK, ArchiveEntry, Budget, tar_entries, zip_entries
from adapters.errors import AdapterError
from adapters.files import FileOps
from adapters.magic import CONVERTER, looks_like_pickle, looks_like_safetensors
from adapters.store import FILES

ENTRIES = 64
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

_DRIVE = re.compile(r"[A-Za-z]:")  # of Windows

# What the standard readers raise on damaged input.
DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile),
    *(EOFError, ValueError, NotImplementedError, RecursionError, OverflowError, IndexError, KeyError),
)


def unpack(archive: Path, into: Path, max_bytes: int, files: FileOps | None = None) -> None:
    """Write the two files of a zip, tar or tar.gz of a peft folder into `into`."""
    size = archive.stat().st_size
    budget = Budget(size, max_bytes)
    with archive.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        try:
            if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
                entries = zip_entries(file, budget)
            elif head[:2] == b"\x1f\x8b":
                entries = tar_entries(gzip.GzipFile(fileobj=file), budget)
            elif head[257:262] == b"ustar":
                entries = tar_entries(file, budget)
            else:
                raise _invalid(_what_else(head))
            _take(entries, into, files or FileOps(), "the archive")
        except DAMAGE as error:
            problem = f"the archive is damaged or cut short: {type(error).__name__}: {error}"
            raise _invalid(f"{problem}; make it and send it again") from error


def gather(parts: Iterable[tuple[str, Path]], into: Path, files: FileOps | None = None) -> None:
    """Write the two files among `parts`, each a name that somebody sent and where its bytes are, into `into`."""
    with ExitStack() as opened:

        def opener(path: Path) -> Callable[[], IO[bytes]]:
            return lambda: opened.enter_context(path.open("rb"))

        entries = (ArchiveEntry(name, "file", opener(path)) for name, path in parts)
        _take(entries, into, files or FileOps(), "the form")


def copy_folder(folder: Path, into: Path, files: FileOps | None = None) -> None:
    """Copy the two files of a peft folder into `into`; links are followed: model caches are made of them."""
    for path in folder_files(folder):
        (files or FileOps()).copy(path, into / path.name)


def folder_files(folder: Path) -> tuple[Path, ...]:
    """The two files of a peft folder, which are there."""
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not present:
        raise AdapterError("invalid_adapter", f"{folder} is not a folder, or it is empty")
    missing = [name for name in FILES if not (folder / name).is_file()]
    inside = [name for name in present if all((folder / name / file).is_file() for file in FILES)]
    if len(missing) == len(FILES) and inside:
        problem = f"{folder} is no adapter itself; name one that is in it: {_counted(inside)}"
        raise AdapterError("invalid_adapter", problem)
    if missing:
        problem = (
            f"{folder} holds {_without(missing, present)}; name a folder that peft's save_pretrained wrote"
        )
        raise AdapterError("invalid_adapter", problem)
    return tuple(folder / name for name in FILES)


def _take(entries: Iterable[ArchiveEntry], into: Path, files: FileOps, whole: str) -> None:
    """Check every entry, and write the two that are wanted; `whole` is what they are entries of."""
    taken: dict[str, PurePosixPath] = {}
    present: list[str] = []
    for entry in entries:
        path = _safe_path(entry)
        present.append(str(path))
        if len(present) > ENTRIES:
            raise _invalid(f"{whole} has more than {ENTRIES} entries")
        name = path.name.lower()
        if entry.kind == "folder" or name not in FILES:
            continue
        if name in taken:
            raise _invalid(
                f"{whole} holds {name} twice, as {_shown(taken[name])} and as {_shown(path)}; send one"
            )
        taken[name] = path
        files.write(into / name, _chunks(entry))
    missing = [name for name in FILES if name not in taken]
    if missing:
        raise _invalid(f"{whole} holds {_without(missing, present)}")
    config, tensors = (taken[name] for name in FILES)
    if config.parent != tensors.parent:
        raise _invalid(f"the two files are in different folders, {_shown(config)} and {_shown(tensors)}")


def _chunks(entry: ArchiveEntry) -> Iterator[bytes]:
    reader = entry.open()
    while chunk := reader.read(CHUNK):
        yield chunk


def _safe_path(entry: ArchiveEntry) -> PurePosixPath:
    """An entry's path, once it cannot lead out of the archive."""
    path = PurePosixPath(entry.name.replace("\\", "/"))  # as .NET separates, and so Windows' PowerShell
    if entry.kind == "other":
        raise _invalid(
            f"{entry.name!r} is a link or a device, which is never unpacked; archive the files themselves "
            "(tar -h follows links)"
        )
    if path.is_absolute() or ".." in path.parts or "\0" in entry.name or _DRIVE.match(entry.name):
        raise _invalid(
            f"{entry.name!r} is a path that leads out of the archive; archive the folder from inside"
        )
    return path


def _shown(path: PurePosixPath) -> str:
    """A path for a message: a tar's names may be bytes that are not text."""
    return repr(str(path))


def _without(missing: list[str], present: list[str]) -> str:
    """That files are missing, and what was there instead."""
    names = [PurePosixPath(name).name for name in present]
    said = f"no {' and no '.join(missing)}, but {_counted(present)}"
    if FILES[1] not in missing:
        return said
    if (
        any(name.startswith("adapter_model") and name.endswith(PICKLES) for name in names)
        or "data.pkl" in names
    ):
        return f"{said}; a PyTorch pickle is never loaded: {CONVERTER}"
    if "adapters.safetensors" in names:
        return f"{said}; adapters.safetensors is written by mlx-lm: convert it to peft's format"
    return said


def _counted(names: list[str]) -> str:
    """The first five, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(map(repr, names[:5])) or "nothing") + more


def _what_else(head: bytes) -> str:
    """A file that is no archive, by its first bytes."""
    if looks_like_safetensors(head):
        return "this is a bare .safetensors file, and its adapter_config.json is needed too"
    if looks_like_pickle(head):
        return f"this is a PyTorch pickle, which is never loaded: {CONVERTER}"
    known = {
        b"GGUF": "a GGUF file, made from the peft adapter that is needed",
        b"BZh": "a bzip2 file",
        b"\xfd7zXZ": "an xz file",
        b"\x28\xb5\x2f\xfd": "a zstandard file",
        b"7z\xbc\xaf": "a 7z archive",
        b"Rar!": "a rar archive",
        b"{": "a JSON file",
    }
    for magic, what in known.items():
        if head.startswith(magic):
            return f"this is {what}, and not a zip, tar or tar.gz archive"
    return f"this is {'an empty file' if not head else 'not a zip, tar or tar.gz archive'}"


def _invalid(message: str) -> AdapterError:
    """The archive is refused."""
    return AdapterError("invalid_archive", message)
