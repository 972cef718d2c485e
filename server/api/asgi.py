"""The outermost layer of every request: its id, its count, and the answer when everything else failed.

Plain ASGI, so that a disconnect still reaches the routes. Knows no route.
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.disconnect import ClientGoneError
from server.api.envelope import error_response
from server.metrics import Metrics

CLIENT_CLOSED = 499  # counted, never sent: the client was gone before an answer began
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Frame:
    """Wraps the app; one per process."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_CLOSED

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
            self.metrics.http_request(getattr(scope.get("route"), "path", "(none)"), status)


def request_id_of(request: Request) -> str:
    """The id that this request's answer carries."""
    request_id = request.state.request_id
    assert isinstance(request_id, str)
    return request_id


def _request_id(scope: Scope) -> str:
    """The client's own id if it is a plain one, or a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
