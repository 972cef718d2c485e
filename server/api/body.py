"""Reads a request's JSON body: its kind, its size, its shape. What is wrong becomes the client's error."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.validation import first_error
from server.errors import BodyTooLargeError, ContentTypeError

MAX_JSON_BYTES = 4 * 1024 * 1024

Body = TypeVar("Body", bound=BaseModel)


async def read_json(request: Request, shape: type[Body]) -> Body:
    """The body as `shape`, checked."""
    kind = media_type(request)
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ContentTypeError("send the body as JSON, with the header `Content-Type: application/json`")
    data = await _read(request)
    try:
        return shape.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise first_error(error.errors(include_url=False, include_context=False)) from None


def media_type(request: Request) -> str:
    """The Content-Type without its parameters; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def announced_length(request: Request) -> int:
    """The Content-Length, or 0 if the body comes in chunks."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


async def _read(request: Request) -> bytes:
    too_large = BodyTooLargeError(f"the body is larger than {MAX_JSON_BYTES} bytes")
    if announced_length(request) > MAX_JSON_BYTES:
        raise too_large
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_JSON_BYTES:
            raise too_large
    return bytes(data)
