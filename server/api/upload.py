"""Receives a large body into temporary files: bounded while counting, hashed, written off the event loop.

`received` takes the body as one file, `received_form` takes a form apart. Knows nothing of what the bytes are.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request

from adapters.errors import AdapterError, full_disk_named
from server.api.asgi import announced_length
from server.api.multipart import FormReader, Part
from server.errors import InvalidRequestError

if TYPE_CHECKING:
    from adapters.store import Store

WRITE_BYTES = 1024 * 1024  # written at once: a thread per network packet would cost more than the disk
PARTS = 64  # of a form
FIELD_BYTES = 1024  # of a form's field that is no file
_DIGEST = "sha-256=:"


@dataclass(frozen=True)
class Form:
    """A received form: the field `name`, and each file with the name it was sent under."""

    name: str
    files: list[tuple[str, Path]]


@asynccontextmanager
async def received(request: Request, store: Store, max_bytes: int) -> AsyncGenerator[Path, None]:
    """The body in a file among the store's work in progress, which is gone afterwards."""
    body = _Body(request, max_bytes)
    async with _folder(store) as folder:
        file = _File(folder / "archive")
        try:
            async for data in body.parts():
                await file.write(data)
            await file.flush()
        finally:
            file.close()
        body.check()
        yield file.path


@asynccontextmanager
async def received_form(
    request: Request, store: Store, max_bytes: int, check_name: Callable[[str], None]
) -> AsyncGenerator[Form, None]:
    """The form's files among the store's work in progress; `check_name` is asked as soon as there is a name."""
    body = _Body(request, max_bytes)
    reader = FormReader(request.headers.get("content-type", ""))
    async with _folder(store) as folder:
        taker = _Taker(folder, check_name)
        try:
            async for data in body.parts():
                for found in reader.feed(data):
                    await taker.take(found)
            reader.finish()
            await taker.end_part()
        finally:
            taker.close()
        body.check()
        yield taker.form()


class _Body:
    """A request's body, counted and hashed as it passes."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        self._request = request
        self._max_bytes = max_bytes
        self._wanted = _content_digest(request)
        self._digest = hashlib.sha256()
        self._check_size(announced_length(request))

    async def parts(self) -> AsyncGenerator[bytes, None]:
        nbytes = 0
        async for data in self._request.stream():
            nbytes += len(data)
            self._check_size(nbytes)
            if self._wanted is not None:
                self._digest.update(data)
            yield data

    def check(self) -> None:
        """All of it came: hold it to the digest that was sent with it."""
        if self._wanted is not None and self._wanted != self._digest.digest():
            raise InvalidRequestError(
                "Content-Digest: the bytes received have another sha-256; send them again",
                param="Content-Digest",
            )

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._max_bytes:
            raise AdapterError(
                "adapter_upload_too_large",
                f"the upload is larger than {self._max_bytes} bytes (--max-upload-bytes)",
            )


class _File:
    """A file that is written in large pieces, on threads."""

    @full_disk_named()
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO = path.open("wb", buffering=0)
        self._pending = bytearray()

    async def write(self, data: bytes) -> None:
        self._pending += data
        if len(self._pending) >= WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        await asyncio.to_thread(self._write, pending)

    def close(self) -> None:
        self._file.close()

    @full_disk_named()
    def _write(self, data: bytearray) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]


class _Taker:
    """Takes a form's parts one after the other: files to disk, the field `name` to memory, others nowhere."""

    def __init__(self, folder: Path, check_name: Callable[[str], None]) -> None:
        self._folder = folder
        self._check_name = check_name
        self._count = 0
        self._file: _File | None = None
        self._field: tuple[str, bytearray] | None = None
        self._name: str | None = None
        self._files: list[tuple[str, Path]] = []

    async def take(self, found: Part | bytes) -> None:
        """The beginning of a part, or bytes of the present one."""
        if isinstance(found, Part):
            await self.end_part()
            self._begin(found)
        elif self._file is not None:
            await self._file.write(found)
        elif self._field is not None:
            name, value = self._field
            value += found
            if len(value) > FIELD_BYTES:
                raise InvalidRequestError(f"{name[:80]}: has more than {FIELD_BYTES} bytes", param=name[:80])

    async def end_part(self) -> None:
        """The present part is complete."""
        if self._file is not None:
            await self._file.flush()
            self.close()
        if self._field is not None and self._field[0] == "name":
            if self._name is not None:
                raise InvalidRequestError("name: is there twice; send it once", param="name")
            self._name = self._field[1].decode("utf-8", "replace")
            self._check_name(self._name)
        self._field = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def form(self) -> Form:
        """What was received, if it is enough."""
        if self._name is None:
            raise InvalidRequestError(
                "name is required: the adapter's name, as a field of the form", param="name"
            )
        if not self._files:
            raise InvalidRequestError(
                "file is required: a zip or tar of the adapter, or its two files", param="file"
            )
        return Form(self._name, self._files)

    def _begin(self, part: Part) -> None:
        self._count += 1
        if self._count > PARTS:
            raise InvalidRequestError(f"the form has more than {PARTS} parts; send one adapter")
        is_file = part.filename is not None or part.name.startswith("adapter_")
        if not is_file:
            self._field = (part.name, bytearray())
            return
        self._file = _File(self._folder / f"part-{self._count}")
        sent_as = part.name if part.name.startswith("adapter_") else part.filename or part.name
        self._files.append((sent_as, self._file.path))


@asynccontextmanager
async def _folder(store: Store) -> AsyncGenerator[Path, None]:
    with full_disk_named():
        folder = await asyncio.to_thread(store.incoming)
    try:
        yield folder
    finally:
        await asyncio.to_thread(store.discard, folder)


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
