"""The raw ASGI side of a request: its id, its body, its client going away.

`Frame` is the outermost layer of every request: it names it, asks for its key, counts it, and answers when everything
else failed; plain ASGI, so that a disconnect still reaches the routes. An `Exchange` is one of them and its answer.
`OpenRequests` are those being answered, for a server that has to end them. `read_json` reads a body: its kind, its
size, its shape. `unless_gone` is a race between a coroutine and the connection's end. Of the routes it knows only paths
that machines ask.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Coroutine
from contextlib import suppress
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
from server.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    ContentTypeError,
    InvalidRequestError,
    NotReadyError,
)
from server.metrics import Metrics

logger = logging.getLogger(__name__)

UNLOGGED = frozenset({"/health", "/ready", "/metrics"})  # asked every second, by machines
CLIENT_CLOSED = 499  # counted, never sent: the client was gone before an answer began
BODY_SECONDS = 60.0  # for the next byte of a body to come
LAST_WORDS_SECONDS = 1.0  # for what is open when the server ends to say why
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

    async def end(self) -> None:
        """Cut them all short, each with an error its client sees; wait for the words to be written."""
        if not self.ended:  # a second time it would be the words that are cut short
            self.ended = True
            for task in self.tasks:
                task.cancel()
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=LAST_WORDS_SECONDS)


class Exchange:
    """One request and how far its answer is."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.request_id = _request_id(scope)
        self.status = CLIENT_CLOSED  # until an answer begins
        self._scope = scope
        self._receive = receive
        self._send = send
        self._arriving = True  # the body
        self._streaming = False
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    async def receive(self) -> Message:
        """The next of the body, if any comes in time; behind it, the client's end, whenever it is."""
        if not self._arriving:
            return await self._receive()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                message = await self._receive()
        except TimeoutError:
            raise BodyTimeoutError(
                f"nothing of the body came for {BODY_SECONDS:g} s; send it again"
            ) from None
        self._arriving = message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            self._streaming = headers.get("content-type", "").startswith("text/event-stream")
        elif not message.get("more_body", False):
            self._streaming = False
        await self._send(message)

    async def fail(self, error: Exception) -> None:
        """Answer with what no route has answered; raises it if an answer has begun."""
        if self.status != CLIENT_CLOSED:
            raise error
        await error_response(error)(self._scope, self._receive, self.send)

    async def cut_short(self) -> None:
        """Say why the answer ends, unless the client does not read."""
        error = NotReadyError("the server was stopped before the answer had ended; send it elsewhere")
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                if self.status == CLIENT_CLOSED:
                    await self.fail(error)
                elif self._streaming:
                    await self.send({"type": "http.response.body", "body": last_events(error)})


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
        exchange = Exchange(scope, receive, send)
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        task = asyncio.current_task()
        assert task is not None, "a request is answered by a task"
        self.requests.tasks.add(task)
        try:
            self._admit(scope)
            await self.app(scope, exchange.receive, exchange.send)
        except (ClientGoneError, ClientDisconnect):
            pass
        except asyncio.CancelledError:
            if not self.requests.ended:
                raise
            await exchange.cut_short()
        except Exception as error:
            await exchange.fail(error)
        finally:
            self.requests.tasks.discard(task)
            self._count(scope, exchange)

    def _admit(self, scope: Scope) -> None:
        """Raise unless the request may be looked at."""
        if "\n" in scope["path"]:  # a route's pattern would match without it, and so another name
            raise InvalidRequestError("the path holds a line's end (%0A)")
        if self.guard.closed and scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN:
            self.guard.admit(Headers(scope=scope))

    def _count(self, scope: Scope, exchange: Exchange) -> None:
        """In metrics, and in one line without a word of what was asked or answered."""
        route = getattr(scope.get("route"), "path", "(none)")
        self.metrics.http_request(route, exchange.status)
        if self.log and route not in UNLOGGED:
            path = ascii(scope["path"])[1:-1]
            logger.info(
                "request id=%s method=%s path=%s status=%d seconds=%.3f",
                *(exchange.request_id, scope["method"], path, exchange.status, exchange.seconds),
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
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise ContentTypeError(
            "a compressed body is not read; send the JSON as it is, without Content-Encoding",
            param="Content-Encoding",
        )
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
