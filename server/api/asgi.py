"""The raw ASGI side of a request: its id, its body, its client going away.

`Frame` is the outermost layer of every request: it names it, counts it, and answers when everything else failed; plain
ASGI, so that a disconnect still reaches the routes. `read_json` reads a body: its kind, its size, its shape.
`unless_gone` is a race between a coroutine and the connection's end. Knows no route.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.envelope import error_response
from server.api.validation import first_error
from server.errors import BodyTooLargeError, ContentTypeError
from server.metrics import Metrics

logger = logging.getLogger(__name__)

UNLOGGED = frozenset({"/health", "/ready", "/metrics"})  # asked every second, by machines
CLIENT_CLOSED = 499  # counted, never sent: the client was gone before an answer began
MAX_JSON_BYTES = 4 * 1024 * 1024
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


class Frame:
    """Wraps the app; one per process."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: bool = False) -> None:
        self.app = app
        self.metrics = metrics
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status, began = CLIENT_CLOSED, time.perf_counter()

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except (ClientGoneError, ClientDisconnect):
            pass
        except Exception as error:
            if status != CLIENT_CLOSED:
                raise
            await error_response(error)(scope, receive, send_named)
        finally:
            route = getattr(scope.get("route"), "path", "(none)")
            self.metrics.http_request(route, status)
            if self.log and route not in UNLOGGED:
                _log(scope, request_id, status, time.perf_counter() - began)


def _log(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    """One line for one request, without a word of what was asked or answered."""
    logger.info(
        "request id=%s method=%s path=%s status=%d seconds=%.3f",
        *(request_id, scope["method"], ascii(scope["path"])[1:-1], status, seconds),
    )


def request_id_of(request: Request) -> str:
    """The id that this request's answer carries."""
    request_id = request.state.request_id
    assert isinstance(request_id, str)
    return request_id


def _request_id(scope: Scope) -> str:
    """The client's own id if it is a plain one, or a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


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
    _check_size(announced_length(request))
    data = bytearray()
    async for part in request.stream():
        data += part
        _check_size(len(data))
    return bytes(data)


def _check_size(nbytes: int) -> None:
    if nbytes > MAX_JSON_BYTES:
        raise BodyTooLargeError(f"the body is larger than {MAX_JSON_BYTES} bytes")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; if the client goes first, `work` is cancelled, has cleaned up, and this raises.

    To be called after the request's body was read: all that `receive` can bring then is the disconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        await _end(working)
        await _end(watching)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has cleaned up."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
