"""A connection's bytes until they are a request: bounded, for they are read before any key is asked for.

uvicorn's parser keeps what it reads of a head, and of the trailers behind a body, however much comes. Knows no request.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.api.envelope import error_response
from server.errors import HeadersTooLargeError

MAX_HEAD_BYTES = 64 * 1024  # first line, headers and blank line: uvicorn's own bound, with its other parser


class BoundedProtocol(HttpToolsProtocol):
    """Counts bytes of which nothing has come yet: no complete head, no part of a body."""

    _nbytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_more()

    def data_received(self, data: bytes) -> None:
        """In parts, so that the bound holds whatever comes at once."""
        while data and not self.transport.is_closing():
            room = MAX_HEAD_BYTES - self._nbytes
            part, data = data[:room], data[room:]
            self._nbytes += len(part)
            super().data_received(part)
            if self._nbytes >= MAX_HEAD_BYTES:
                self._refuse()
        self._wait_for_more()

    def on_headers_complete(self) -> None:
        self._nbytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._nbytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._nbytes = 0
        super().on_message_complete()

    def _wait_for_more(self) -> None:
        """Only so long; uvicorn does that behind an answer, but not for a first request, or the rest of a head."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _refuse(self) -> None:
        """Answer, unless another answer has begun, and close."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            answer = error_response(
                HeadersTooLargeError(f"the request's line and headers are larger than {MAX_HEAD_BYTES} bytes")
            )
            lines = [name + b": " + value + b"\r\n" for name, value in answer.raw_headers]
            head = b"".join([STATUS_LINE[answer.status_code], *lines, b"\r\n"])
            self.transport.write(head + bytes(answer.body))
        self.transport.close()
