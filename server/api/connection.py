"""A connection's bytes until they are a request: bounded, for they are read before any key is asked for.

uvicorn's parser keeps what it reads of a head, and of the trailers behind a body, however much comes. HTTP/1.1 is all
that is spoken: what else a client offers is passed over. Knows no request.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.api.envelope import error_response
from server.errors import HeadersTooLargeError

MAX_HEAD_BYTES = 64 * 1024  # first line, headers and blank line: uvicorn's own bound, with its other parser


class DecliningParser(httptools.HttpRequestParser):
    """Passes over offers to go on in another protocol (`Upgrade`), as a server may.

    llhttp takes all that follows such a head for the other protocol, and the request for one without a body. Java's
    HttpClient offers HTTP/2 with every request and sends its body all the same, so the head is read again as if it had
    offered nothing: by another parser, since this one skips what follows a head that asks to close.
    """

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__(protocol)
        self._protocol = protocol
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    @property
    def declines(self) -> bool:
        """Whether this head will be read again."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        parser = self
        while True:
            try:
                super(DecliningParser, parser).feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                if not parser.declines:
                    raise
                data = self._protocol.head_without_offer() + data[offer.args[0] :]
                parser = self._protocol.parser = DecliningParser(self._protocol)


class Unchunked:
    """Ends an answer of unknown length with its connection. uvicorn would send chunks, which HTTP/1.0 does not know."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._endless = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._endless = b"content-length" not in dict(message["headers"])
            self._cycle.chunked_encoding = False if self._endless else None
        elif self._endless:
            # uvicorn sends no more than was announced, and in the end no less
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)


class BoundedProtocol(HttpToolsProtocol):
    """Counts bytes of which nothing has come yet: no complete head, no part of a body."""

    _nbytes = 0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.parser: DecliningParser = DecliningParser(self)

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
        if not self.parser.declines:
            super().on_headers_complete()
            if self.scope["http_version"] == "1.0":
                self.cycle.send = Unchunked(self.cycle)  # type: ignore[method-assign]

    def on_body(self, body: bytes) -> None:
        self._nbytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._nbytes = 0
        if not self.parser.declines:
            super().on_message_complete()

    def head_without_offer(self) -> bytes:
        """The head that was read last, as it would be if it did not offer to change the protocol."""
        first = b"%s %s HTTP/%s\r\n" % (
            self.parser.get_method(),
            self.url,
            self.parser.get_http_version().encode(),
        )
        kept = [name + b": " + value + b"\r\n" for name, value in self.headers if name != b"upgrade"]
        return b"".join([first, *kept, b"\r\n"])

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
