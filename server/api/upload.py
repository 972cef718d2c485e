"""Receives a large body into a temporary file: bounded while counting, hashed, written off the event loop.

Knows nothing of what the bytes are.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import hashlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request

from adapters.errors import AdapterError
from server.api.asgi import announced_length
from server.errors import InvalidRequestError

if TYPE_CHECKING:
    from adapters.store import Store

WRITE_BYTES = 1024 * 1024  # written at once: a thread per network packet would cost more than the disk
_DIGEST = "sha-256=:"


@dataclass(frozen=True)
class Upload:
    """A received body."""

    path: Path
    nbytes: int
    sha256: bytes


@asynccontextmanager
async def received(request: Request, store: Store, max_bytes: int) -> AsyncGenerator[Upload, None]:
    """The body in a file among the store's work in progress, which is gone afterwards."""
    _check_size(announced_length(request), max_bytes)
    wanted = _content_digest(request)
    folder = await asyncio.to_thread(store.incoming)
    try:
        upload = await _receive(request, folder / "archive", max_bytes)
        if wanted is not None and wanted != upload.sha256:
            raise InvalidRequestError(
                "Content-Digest: the bytes received have another sha-256; send them again",
                param="Content-Digest",
            )
        yield upload
    finally:
        await asyncio.to_thread(store.discard, folder)


async def _receive(request: Request, path: Path, max_bytes: int) -> Upload:
    digest = hashlib.sha256()
    pending = bytearray()
    nbytes = 0

    def write(data: bytes) -> None:
        digest.update(data)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise AdapterError("store_full", "the disk is full; remove adapters or enlarge it") from error
            raise

    with path.open("wb", buffering=0) as file:
        async for part in request.stream():
            nbytes += len(part)
            _check_size(nbytes, max_bytes)
            pending += part
            if len(pending) >= WRITE_BYTES:
                await asyncio.to_thread(write, bytes(pending))
                pending.clear()
        await asyncio.to_thread(write, bytes(pending))
    return Upload(path, nbytes, digest.digest())


def _check_size(nbytes: int, max_bytes: int) -> None:
    if nbytes > max_bytes:
        raise AdapterError(
            "adapter_upload_too_large", f"the upload is larger than {max_bytes} bytes (--max-upload-bytes)"
        )


def _content_digest(request: Request) -> bytes | None:
    """The sha-256 of a Content-Digest header (RFC 9530)."""
    header = request.headers.get("content-digest")
    if header is None:
        return None
    for member in header.split(","):
        text = member.strip()
        if text.startswith(_DIGEST) and text.endswith(":"):
            try:
                return base64.b64decode(text[len(_DIGEST) : -1], validate=True)
            except binascii.Error:
                break
    raise InvalidRequestError("Content-Digest: must hold sha-256=:<base64>:", param="Content-Digest")
