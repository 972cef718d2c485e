"""The raw ASGI side of a request: its id, its body, its client going away.

`Frame` is the outermost layer of every request: it names it, asks for its key, counts it, and answers when everything
else failed; plain ASGI, so that a disconnect still reaches the routes. `OpenRequests` are those being answered, for a
server that has to end them. `read_json` reads a body: its kind, its size, its shape.
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

from server.api.auth import OPEN, Guard
from server.api.envelope import error_response, last_events
from server.api.validation import first_error
from server.config import Settings
from server.errors import BodyTooLargeError, ContentTypeError, InvalidRequestError, NotReadyError
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


class OpenRequests:
    """The requests being answered, each as the task that answers it."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self.ended = False

    async def end(self, seconds: float) -> None:
        """Cut them all short, each with an error its client sees; wait so long for the words to be written."""
        self.ended = True
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=seconds)


class Frame:
    """Wraps the app; one per process."""

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, guard: Guard, requests: OpenRequests
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.guard = guard
        self.requests = requests
        self.root_path = settings.root_path
        self.log = settings.enable_log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.root_path:
            scope["root_path"] = self.root_path
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status, streaming, began = CLIENT_CLOSED, False, time.perf_counter()

        async def send_named(message: Message) -> None:
            nonlocal status, streaming
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                streaming = headers.get("content-type", "").startswith("text/event-stream")
            elif not message.get("more_body", False):
                streaming = False
            await send(message)

        task = asyncio.current_task()
        assert task is not None, "a request is answered by a task"
        self.requests.tasks.add(task)
        try:
            if "\n" in scope["path"]:  # a route's pattern would match without it, and so another name
                raise InvalidRequestError("the path holds a line's end (%0A)")
            if self.guard.closed and scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN:
                self.guard.admit(Headers(scope=scope))
            await self.app(scope, receive, send_named)
        except (ClientGoneError, ClientDisconnect):
            pass
        except asyncio.CancelledError:
            if not self.requests.ended:
                raise
            error = NotReadyError("the server was stopped before the answer had ended; send it elsewhere")
            if status == CLIENT_CLOSED:
                await error_response(error)(scope, receive, send_named)
            elif streaming:
                await send_named({"type": "http.response.body", "body": last_events(error)})
        except Exception as error:
            if status != CLIENT_CLOSED:
                raise
            await error_response(error)(scope, receive, send_named)
        finally:
            self.requests.tasks.discard(task)
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
