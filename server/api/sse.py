"""Server-sent events as OpenAI's clients read them: `data: {json}` and a blank line, `[DONE]` at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import orjson
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.disconnect import ClientGoneError, unless_gone

DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of events that calls `close` at its end, whoever ends it: events, client or server."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        headers: Mapping[str, str],
    ) -> None:
        unbuffered = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(
            events, headers={**unbuffered, **headers}, media_type="text/event-stream; charset=utf-8"
        )
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGoneError, OSError):  # newer ASGI servers raise OSError from send
                await unless_gone(receive, self.stream_response(send))
        finally:
            await self._events.aclose()
            await self._close()
