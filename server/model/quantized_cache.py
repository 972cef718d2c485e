"""Quantized copies of checkpoints on disk: quantizing a billion parameters takes most of a minute, reading them half a
second. Knows nothing of how a checkpoint is quantized or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".py")  # and code that comes with them
_MAKING = ".making-"
_LEFT_SECONDS = 24 * 3600  # nobody quantizes for so long


def cache_key(model: Path, settings: dict[str, str]) -> str:
    """A hash over the model's weight files (name, size, time), its configuration and how it is quantized."""
    files = sorted(path for path in model.iterdir() if path.suffix in _WEIGHTS)
    described = {
        "files": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "config": (model / "config.json").read_text(),
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def cached(root: Path, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of `key` under `root`; if there is none, `make` fills a temporary one that is then moved there."""
    folder = root / key
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    made = Path(tempfile.mkdtemp(prefix=_MAKING, dir=root))
    try:
        make(made)
        os.replace(made, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its copy is the same
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _sweep(root: Path) -> None:
    """Remove what processes left that were killed while they made a copy, by age: not all who share it see a lock."""
    for left in root.glob(f"{_MAKING}*"):
        with suppress(OSError):  # it is gone
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
