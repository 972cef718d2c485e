"""Answers a generation request, whole or as a stream: selection, submission, disconnects, clean-up.

Shared by completions and chat, which differ in the `Format` they bring and in how they make token ids. A stream is
server-sent events as OpenAI's clients read them: `data: {json}` and a blank line, `[DONE]` at the end.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.asgi import ClientGoneError, request_id_of, unless_gone
from server.api.envelope import as_error, envelope
from server.api.generation import Generation, Lengths, Piece, Prompt, Scored, choices_for
from server.api.schemas.generation import Body, StreamOptions
from server.api.selection import Target, select
from server.errors import InvalidRequestError
from server.serving import Edge, Served
from server.text.tokenizer import Tokenizer

Fields = dict[str, Any]

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's


@dataclass(frozen=True)
class Format:
    """How one endpoint spells its answers."""

    id_prefix: str
    whole: str  # the `object` of a whole answer
    chunk: str  # and of a chunk
    choice: Callable[[str], Fields]  # a whole choice's text
    delta: Callable[[str, bool], Fields]  # a piece of text; whether it is the choice's first
    logprobs: Callable[[Tokenizer, Sequence[Scored]], Fields]


@dataclass(frozen=True)
class Call:
    """One request on its way: who asked, for what, in which format."""

    request: Request
    edge: Edge
    served: Served
    body: Body
    format: Format

    def logprobs(self, scored: Sequence[Scored]) -> Fields | None:
        """None where no tokens are told, because none were asked for or none have come."""
        return self.format.logprobs(self.served.tokenizer, scored) if scored else None


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


async def answer(call: Call, lengths: Lengths, encode: Callable[[], Awaitable[Sequence[Prompt]]]) -> Response:
    """The response to `call`. Every path out of here releases the adapter and ends the sequences."""
    body, served, edge, receive = call.body, call.served, call.edge, call.request.receive
    async with AsyncExitStack() as stack:
        target = select(served, edge.base_names(served), body.model, body.adapter)
        stack.callback(target.release)
        most = edge.settings.max_queued_requests
        if body.choices > most:
            raise InvalidRequestError(f"prompts times n must be at most {most}", param="prompt")
        prompts = await encode()
        choices = choices_for(body, lengths, prompts, served, target.generation)
        prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        generation = Generation(served, edge.metrics, target.adapter, choices, body.stops, prompt_tokens)
        stack.push_async_callback(generation.aclose)
        head = _head(call, target)
        if not body.stream:
            whole = await unless_gone(receive, _whole(generation, call, head))
            return Response(orjson.dumps(whole), 200, target.headers, "application/json")
        first = await unless_gone(receive, anext(generation))
        chunks = _chunks(generation, first, call, {**head, "object": call.format.chunk})
        return EventStream(chunks, stack.pop_all().aclose, target.headers)


def _head(call: Call, target: Target) -> Fields:
    return {
        "id": call.format.id_prefix + request_id_of(call.request),
        "object": call.format.whole,
        "created": int(time.time()),
        **target.labels,
    }


async def _whole(generation: Generation, call: Call, head: Mapping[str, Any]) -> Fields:
    pieces: list[list[Piece]] = [[] for _ in range(generation.choices)]
    async for piece in generation:
        pieces[piece.choice].append(piece)
    choices = [
        {
            "index": index,
            **call.format.choice("".join(piece.text for piece in its)),
            "logprobs": call.logprobs([scored for piece in its for scored in piece.scored]),
            **_end(its[-1]),
        }
        for index, its in enumerate(pieces)
    ]
    return {**head, "choices": choices, "usage": generation.usage}


async def _chunks(
    generation: Generation, first: Piece, call: Call, head: Mapping[str, Any]
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; an error becomes an event, because the status has been sent."""
    options = call.body.stream_options or StreamOptions()
    begun: set[int] = set()

    def chunk(piece: Piece) -> bytes:
        delta = call.format.delta(piece.text, piece.choice not in begun)
        begun.add(piece.choice)
        choice = {"index": piece.choice, **delta, "logprobs": call.logprobs(piece.scored), **_end(piece)}
        usage = generation.usage if options.continuous_usage_stats else None
        return _event({**head, "choices": [choice], **({"usage": usage} if counted else {})})

    counted = options.include_usage or options.continuous_usage_stats
    try:
        yield chunk(first)
        async for piece in generation:
            yield chunk(piece)
        if options.include_usage:
            yield _event({**head, "choices": [], "usage": generation.usage})
    except Exception as error:
        yield _event(envelope(as_error(error)))
    yield DONE


def _end(piece: Piece) -> Fields:
    return {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}


def bounded(logprob: float) -> float:
    """As JSON can say it."""
    return max(logprob, LEAST_LOGPROB)


def _event(data: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"
