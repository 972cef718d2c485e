"""A peft folder as the zip that an upload takes. Knows nothing of HTTP."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

FILES = ("adapter_config.json", "adapter_model.safetensors")


def zipped(folder: Path) -> bytes:
    """The folder's two files in one archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in FILES:
            archive.write(folder / name, name)
    return buffer.getvalue()
