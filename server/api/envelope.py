"""How an error looks on the wire: `{"error": {"message", "type", "param", "code"}}`, its status, its headers.

The one place that turns exceptions into bytes. Knows nothing of what raised them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match

from adapters.errors import AdapterError
from server.api.validation import first_error
from server.errors import AdapterRejectedError, LoraplexError

logger = logging.getLogger(__name__)

MAX_MESSAGE = 2000  # characters; messages quote what the client sent
RETRY_AFTER = {429: "1", 503: "5"}  # seconds; OpenAI's clients ignore anything above 120
NO_RETRY = frozenset({409, 507})  # OpenAI's clients would repeat these, and nothing would change
CLOSING = frozenset({408, 413, 431})
# for clients whose base URL lacks its /v1, or that ask for OpenAI's Responses unless told otherwise
ROUTES = "text comes from POST /v1/chat/completions and /v1/completions, and GET /docs shows every route"
CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def as_error(error: Exception) -> LoraplexError:
    """Any exception as one that a client may see; what is our own mistake is logged and not shown."""
    match error:
        case LoraplexError():
            return error
        case AdapterError():
            return AdapterRejectedError(error)
        case _:
            logger.error("internal error", exc_info=error)
            return LoraplexError("internal error; the server's log has the reason")


def envelope(error: LoraplexError) -> dict[str, Any]:
    """The error's body, also sent as an event when a stream has begun."""
    body = _body(error.message, error.type, error.param, error.code)
    if error.details:
        body["error"]["details"] = [asdict(finding) for finding in error.details]
    return body


def error_response(error: Exception) -> Response:
    """The whole answer to a request that failed before anything was sent."""
    shown = as_error(error)
    return _response(shown.http_status, envelope(shown))


def last_events(error: Exception) -> bytes:
    """How a stream ends that an error cuts short."""
    return b"data: " + orjson.dumps(envelope(as_error(error))) + b"\n\ndata: [DONE]\n\n"


def install(app: FastAPI, routes: Sequence[APIRoute]) -> None:
    """Answer every error of `app` with an envelope; what no handler knows reaches `server/api/asgi.py`."""

    async def ours(_: Request, error: Exception) -> Response:
        return error_response(error)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(first_error(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = _http_error(request, error)
        if error.status_code == 405:  # Starlette names the methods of the first of a path's routes alone
            response.headers["allow"] = ", ".join(_methods(request, routes))
        return response

    app.add_exception_handler(LoraplexError, ours)
    app.add_exception_handler(AdapterError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _http_error(request: Request, error: HTTPException) -> Response:
    """The framework's own refusals: no such route, or not with this method."""
    messages = {
        404: f"no route {request.method} {request.url.path}; {ROUTES}",
        405: f"{request.url.path} does not answer {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    code = CODES.get(error.status_code, "invalid_value")
    response = _response(error.status_code, _body(message, "invalid_request_error", None, code))
    response.headers.update(error.headers or {})
    return response


def _methods(request: Request, routes: Sequence[APIRoute]) -> list[str]:
    """Of every route with the request's path."""
    found = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in found for method in route.methods or ()})


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message[:MAX_MESSAGE], "type": kind, "param": param, "code": code}}


def _response(status: int, body: dict[str, Any]) -> Response:
    headers = {}
    if status in RETRY_AFTER:
        headers["retry-after"] = RETRY_AFTER[status]
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in NO_RETRY:
        headers["x-should-retry"] = "false"
    if status in CLOSING:
        headers["connection"] = "close"  # the rest of the request is not read
    return Response(orjson.dumps(body), status, headers, "application/json")
