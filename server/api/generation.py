"""The sequences of one request: what the engine is asked to run, and the pieces of text that come of it.

From a checked body and its prompts' ids to `Submit`s: lengths, seeds, defaults, stop tokens. Then tokens become text,
cut at stop strings, and are counted. Knows nothing of HTTP or of the shape of an answer.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from server.api.schemas.generation import GenerationRequest
from server.engine.sequence import Finished, FinishReason, Sampling, Submit, Token
from server.errors import ContextLengthError, InvalidRequestError, NotReadyError, QueueFullError
from server.metrics import Ending, Metrics, Outcome, TokenClock
from server.serving import Served
from server.text.tokenizer import StopChecker

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Lengths:
    """How many tokens may be generated: what was asked for, and what it is if nothing was."""

    asked: int | None
    default: int | None  # None: all the room there is


def submits_for(
    body: GenerationRequest, lengths: Lengths, prompts: Sequence[Ids], served: Served, generation: str | None
) -> list[Submit]:
    """One `Submit` per choice, those of one prompt side by side; choice k of a prompt draws with seed + k."""
    unique = secrets.token_hex(8)  # a client may send one request id twice, the engine must not see it twice
    stop_ids = _stop_ids(body, served)
    found: list[Submit] = []
    for prompt in prompts:
        max_tokens = _max_tokens(lengths, len(prompt), served.max_model_len)
        seed = served.seeds.getrandbits(63) if body.seed is None else body.seed
        for k in range(body.n):
            sampling = Sampling(
                max_tokens=max_tokens,
                temperature=served.defaults.temperature if body.temperature is None else body.temperature,
                top_p=served.defaults.top_p if body.top_p is None else body.top_p,
                top_k=served.defaults.top_k if body.top_k is None else max(0, body.top_k),
                seed=_int64(seed + k),
                stop_token_ids=stop_ids,
            )
            found.append(Submit(f"{unique}-{len(found)}", prompt, sampling, generation))
    return found


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> Ids:
    """Token ids that the model has."""
    for id in ids:
        if not 0 <= id < vocab_size:
            raise InvalidRequestError(
                f"{param}: token id {str(id)[:24]} is not in the vocabulary of {vocab_size}", param=param
            )
    return tuple(ids)


def _stop_ids(body: GenerationRequest, served: Served) -> frozenset[int]:
    given = check_ids(body.stop_token_ids or (), served.vocab_size, "stop_token_ids")
    return frozenset(given) if body.ignore_eos else frozenset(given) | served.eos_token_ids


def _max_tokens(lengths: Lengths, prompt: int, limit: int) -> int:
    room = limit - prompt
    asked = lengths.asked
    if room < max(1, asked or 1):
        wanted = f" and {asked} are asked for" if asked is not None else ""
        raise ContextLengthError(
            f"the model takes {limit} tokens; the prompt has {prompt}{wanted}; shorten one of them",
            param="prompt",
        )
    return asked or min(room, lengths.default or room)


def _int64(value: int) -> int:
    """`value` wrapped into 64 signed bits."""
    return (value + 2**63) % 2**64 - 2**63


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
        self._clocks = {
            index: metrics.token_clock(adapter, len(submit.prompt)) for index, submit in enumerate(submits)
        }
        streams = [
            _pieces(served, self._clocks[index], index, submit, stops) for index, submit in enumerate(submits)
        ]
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
        if piece.finish_reason is not None:
            self._end(piece.choice, piece.finish_reason)
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

    def _end(self, choice: int, ending: Ending) -> None:
        """Stop the clock of a choice."""
        self._clocks.pop(choice).end(ending)

    async def aclose(self) -> None:
        """End what still runs, and count the request."""
        await self._pieces.aclose()
        for choice in tuple(self._clocks) if self._outcome != "rejected" else ():
            self._end(choice, "error" if self._outcome == "failed" else "abort")
        seconds = time.perf_counter() - self._began
        self._metrics.generation(
            self._adapter, self._outcome, self.prompt_tokens, self.completion_tokens, seconds
        )


async def _pieces(
    served: Served, clock: TokenClock, choice: int, submit: Submit, stops: Sequence[str]
) -> AsyncGenerator[Piece, None]:
    """One sequence's text. Closing it, or finding a stop string, aborts the sequence."""
    detokenizer = served.tokenizer.detokenizer()
    checker = StopChecker(stops)
    last: int | None = None
    tokens = 0  # received since the last piece
    async with aclosing(served.engine.stream(submit)) as events:
        async for event in events:
            match event:
                case Token(token_id=last):
                    clock.tick(event.queued)
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
