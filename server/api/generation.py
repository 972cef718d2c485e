"""Runs the sequences of one request: tokens become pieces of text, cut at stop strings, and are counted.

Knows nothing of HTTP or of the shape of an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from server.engine.messages import Finished, FinishReason, Submit, Token
from server.errors import NotReadyError, QueueFullError
from server.metrics import Metrics, Outcome
from server.serving import Served
from server.text.stop import StopChecker


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that one choice gained, and the tokens that came for it; a choice's last says why it ended."""

    choice: int
    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that ended it, if the caller gave one


class Generation:
    """The sequences of one request. Iterate over it for the pieces; close it in any case."""

    def __init__(
        self,
        served: Served,
        metrics: Metrics,
        adapter: str | None,
        submits: Sequence[Submit],
        stops: Sequence[str],
        prompt_tokens: int,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.choices = len(submits)
        self._metrics = metrics
        self._adapter = adapter
        self._began = time.perf_counter()
        self._outcome: Outcome = "cancelled"
        streams = [_pieces(served, metrics, index, submit, stops) for index, submit in enumerate(submits)]
        self._pieces = streams[0] if len(streams) == 1 else _merged(streams)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Piece:
        try:
            piece = await anext(self._pieces)
        except StopAsyncIteration:
            self._outcome = "completed"
            raise
        except Exception as error:
            self._outcome = "rejected" if isinstance(error, QueueFullError) else "failed"
            raise
        self.completion_tokens += piece.tokens
        return piece

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    async def aclose(self) -> None:
        """End what still runs, and count the request."""
        await self._pieces.aclose()
        seconds = time.perf_counter() - self._began
        self._metrics.generation(
            self._adapter, self._outcome, self.prompt_tokens, self.completion_tokens, seconds
        )


async def _pieces(
    served: Served, metrics: Metrics, choice: int, submit: Submit, stops: Sequence[str]
) -> AsyncGenerator[Piece, None]:
    """One sequence's text. Closing it, or finding a stop string, aborts the sequence."""
    detokenizer = served.tokenizer.detokenizer()
    checker = StopChecker(stops)
    clock = metrics.token_clock()
    last: int | None = None
    tokens = 0  # received since the last piece
    async with aclosing(served.engine.stream(submit)) as events:
        async for event in events:
            match event:
                case Token(token_id=last):
                    clock.tick()
                    tokens += 1
                    if last in submit.sampling.stop_token_ids:
                        continue  # it ends the sequence and is not shown
                    text = checker.feed(detokenizer.add(last))
                    if checker.matched is not None:
                        yield Piece(choice, text, tokens, "stop", checker.matched)
                        return
                    if text:
                        yield Piece(choice, text, tokens)
                        tokens = 0
                case Finished(reason="abort"):
                    raise NotReadyError("the server stopped before the completion had ended")
                case Finished(reason=reason):
                    text = checker.feed(detokenizer.flush())
                    if checker.matched is not None:
                        yield Piece(choice, text, tokens, "stop", checker.matched)
                        return
                    theirs = reason == "stop" and last is not None and last not in served.eos_token_ids
                    yield Piece(choice, text + checker.flush(), tokens, reason, last if theirs else None)


async def _merged(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """The pieces of all choices in the order in which they come; an error of one ends them all."""
    arrivals: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    arrivals.put_nowait(piece)
            arrivals.put_nowait(None)
        except Exception as error:
            arrivals.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            arrival = await arrivals.get()
            match arrival:
                case None:
                    running -= 1
                case Exception():
                    raise arrival
                case _:
                    yield arrival
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
