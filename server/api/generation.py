"""The sequences of one request: what the engine is asked to run, and the pieces of text that come of it.

From a checked body and its prompts' ids to `Submit`s: lengths, seeds, defaults, stop tokens. Then tokens become text,
cut at stop strings, and are counted; a token's logprobs go with the text that it came with, or the next there is. Knows
nothing of HTTP or of the shape of an answer.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from server.api.schemas.generation import Body
from server.engine.sequence import Finished, FinishReason, Logprobs, PromptLogprobs, Sampling, Submit, Token
from server.errors import ContextLengthError, InvalidRequestError, QueueFullError
from server.metrics import Ending, Metrics, Outcome, TokenClock
from server.serving import Served
from server.text.tokenizer import IncrementalDetokenizer, StopChecker, Tokenizer

Ids = tuple[int, ...]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Echo:
    """A prompt as it is shown again: its text, where in it each token begins, and a decoder that goes on behind it."""

    text: str
    offsets: tuple[int, ...]
    detokenizer: IncrementalDetokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Ids, given: str | None) -> Echo:
        """`given` is the text that the ids were made from, if they were, and is shown as it is."""
        detokenizer = tokenizer.detokenizer()
        pieces: list[str] = []
        offsets: list[int] = []
        length = 0
        for id in ids:
            if given is not None and id in tokenizer.special_ids:
                length += len(detokenizer.flush())
                offsets.append(length)
                name = tokenizer.name(id)  # stands in the text if the client wrote it
                length += len(name) if given.startswith(name, length) else 0
            else:
                offsets.append(length + detokenizer.held)
                pieces.append(detokenizer.add(id))
                length += len(pieces[-1])
        if given is None:
            return cls("".join(pieces), tuple(offsets), detokenizer)
        detokenizer.flush()
        return cls(given, tuple(min(offset, len(given)) for offset in offsets), detokenizer)


@dataclass(frozen=True)
class Prompt:
    """What one prompt is for the model, and how it is shown again if that was asked for."""

    ids: Ids
    echo: Echo | None = None


@dataclass(frozen=True)
class Choice:
    """One sequence that is asked for."""

    submit: Submit
    echo: Echo | None
    own_ends: frozenset[int] = frozenset()  # stop tokens that are the model's, not the caller's


@dataclass(frozen=True)
class Lengths:
    """How many tokens may be generated: what was asked for, what it is if nothing was, and behind what."""

    asked: int | None
    default: int | None  # None: all the room there is
    behind: str  # the field with the prompt

    def most(self, prompt: int, limit: int) -> int:
        """Tokens behind so many of a prompt; raises if the model's length is too little."""
        room = limit - prompt
        if room < (1 if self.asked is None else self.asked):
            wanted = f" and {self.asked} are asked for" if self.asked is not None else ""
            # OpenAI's words first: LiteLLM, and what is built on it, knows the error by them and not by its code
            raise ContextLengthError(
                f"this model's maximum context length is {limit} tokens; the prompt has {prompt}{wanted}; "
                "shorten one of them",
                param=self.behind,
            )
        return min(room, self.default or room) if self.asked is None else self.asked


def choices_for(
    body: Body, lengths: Lengths, prompts: Sequence[Prompt], served: Served, generation: str | None
) -> list[Choice]:
    """The choices of one prompt side by side; choice k of a prompt draws with seed + k."""
    unique = secrets.token_hex(8)  # a client may send one request id twice, the engine must not see it twice
    own_ends = frozenset[int]() if body.ignore_eos else served.eos_token_ids
    found: list[Choice] = []
    for prompt in prompts:
        sampling = _sampling(body, lengths, prompt, served)
        for k in range(body.n):
            submit = Submit(
                f"{unique}-{len(found)}",
                prompt.ids,
                replace(sampling, seed=_int64(sampling.seed + k)),
                generation,
            )
            found.append(Choice(submit, prompt.echo, own_ends))
    return found


def _sampling(body: Body, lengths: Lengths, prompt: Prompt, served: Served) -> Sampling:
    """What the body says, else what the model's authors or the API say, for the prompt's first choice."""
    defaults = served.defaults
    max_tokens = lengths.most(len(prompt.ids), served.max_model_len)
    if (body.min_tokens or 0) > max_tokens:
        raise InvalidRequestError(
            f"min_tokens: {body.min_tokens} is more than the {max_tokens} tokens that may come at most",
            param="min_tokens",
        )
    return Sampling(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, defaults.temperature),
        top_p=_or(body.top_p, defaults.top_p),
        top_k=max(0, _or(body.top_k, defaults.top_k)),
        min_p=_or(body.min_p, defaults.min_p),
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_biases(body, served),
        min_tokens=body.min_tokens or 0,
        seed=served.seeds.getrandbits(63) if body.seed is None else body.seed,
        stop_token_ids=_stop_ids(body, served),
        logprobs=body.top,
        prompt_logprobs=None if prompt.echo is None else body.top,
    )


def _or(given: Number | None, default: Number) -> Number:
    return default if given is None else given


def _biases(body: Body, served: Served) -> tuple[tuple[int, float], ...]:
    given = {int(id): value for id, value in (body.logit_bias or {}).items()}
    check_ids(list(given), served.vocab_size, "logit_bias")
    return tuple(given.items())


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> Ids:
    """Token ids that the model has."""
    for id in ids:
        if not 0 <= id < vocab_size:
            raise InvalidRequestError(
                f"{param}: token id {str(id)[:24]} is not in the vocabulary of {vocab_size}", param=param
            )
    return tuple(ids)


def check_known(ids: Ids, served: Served, param: str) -> Ids:
    """The ids of a text; raises for tokens that were added to the tokenizer and not to the model.

    The model has no embedding for them: a GPU would give up on everybody's requests, not on this one alone.
    """
    for id in ids:
        if id >= served.vocab_size:
            raise InvalidRequestError(
                f"{param}: holds {served.tokenizer.name(id)!r}, token id {id}, which the model's vocabulary of "
                f"{served.vocab_size} does not have; leave it out",
                param=param,
            )
    return ids


def _stop_ids(body: Body, served: Served) -> frozenset[int]:
    given = check_ids(body.stop_token_ids or (), served.vocab_size, "stop_token_ids")
    return frozenset(given) if body.ignore_eos else frozenset(given) | served.eos_token_ids


def _int64(value: int) -> int:
    """`value` wrapped into 64 signed bits."""
    return (value + 2**63) % 2**64 - 2**63


@dataclass(frozen=True, slots=True)
class Scored:
    """A token that is told with its logprobs. A prompt's first token follows nothing and has none."""

    token_id: int
    logprobs: Logprobs | None
    offset: int  # characters of the choice's text before it


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that one choice gained, and the tokens that came for it; a choice's last says why it ended."""

    choice: int
    text: str
    tokens: int
    scored: tuple[Scored, ...] = ()  # these tokens, and those of an echoed prompt, if logprobs were asked for
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that ended it, if the caller gave one


class Transcript:
    """The text of one choice while it grows, and what of it has not been given out in a piece."""

    def __init__(self, tokenizer: Tokenizer, index: int, choice: Choice, stops: Sequence[str]) -> None:
        echo, self._sampling = choice.echo, choice.submit.sampling
        self._index = index
        self._choice = choice
        self._detokenizer = (
            tokenizer.detokenizer(behind=choice.submit.prompt) if echo is None else echo.detokenizer.copy()
        )
        self._checker = StopChecker(stops)
        self._text = "" if echo is None else echo.text
        self._length = len(self._text)  # of all text, that which may yet be a stop string included
        self._generated = 0  # tokens
        self._tokens = 0  # of these, since the last piece
        self._scored: list[Scored] = []

    @property
    def stop(self) -> str | None:
        """The stop string that was found; nothing after it is shown."""
        return self._checker.matched

    @property
    def has_text(self) -> bool:
        """Whether there is text to give out."""
        return bool(self._text)

    def score_prompt(self, logprobs: Sequence[Logprobs]) -> None:
        """The echoed prompt's tokens have become known."""
        assert self._choice.echo is not None, "nobody asked for them"
        ids, offsets = self._choice.submit.prompt, self._choice.echo.offsets
        self._scored += map(Scored, ids, (None, *logprobs), offsets)

    def add(self, id: int, logprobs: Logprobs | None) -> None:
        """The next token. One that ends the sequence is not shown."""
        self._generated += 1
        self._tokens += 1
        if logprobs is not None:
            self._scored.append(Scored(id, logprobs, self._length + self._detokenizer.held))
        if id not in self._sampling.stop_token_ids:
            self._show(self._detokenizer.add(id))

    def end(self) -> None:
        """No more tokens come."""
        self._show(self._detokenizer.flush())
        self._text += self._checker.flush()

    def take(self, reason: FinishReason | None = None, stop: str | int | None = None) -> Piece:
        """All that has come since the last piece."""
        piece = Piece(self._index, self._text, self._tokens, tuple(self._scored), reason, stop)
        self._text, self._tokens, self._scored = "", 0, []
        return piece

    def _show(self, text: str) -> None:
        self._length += len(text)
        early = self._generated <= self._sampling.min_tokens
        self._text += text if early else self._checker.feed(text)


class Generation:
    """The sequences of one request. Iterate over it for the pieces; close it in any case."""

    def __init__(
        self,
        served: Served,
        metrics: Metrics,
        adapter: str | None,
        choices: Sequence[Choice],
        stops: Sequence[str],
        prompt_tokens: int,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.choices = len(choices)
        self._metrics = metrics
        self._adapter = adapter
        self._began = time.perf_counter()
        self._outcome: Outcome = "cancelled"
        self._clocks = {
            index: metrics.token_clock(adapter, len(choice.submit.prompt))
            for index, choice in enumerate(choices)
        }
        streams = [
            _pieces(served, self._clocks[index], choice, Transcript(served.tokenizer, index, choice, stops))
            for index, choice in enumerate(choices)
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
    served: Served, clock: TokenClock, choice: Choice, transcript: Transcript
) -> AsyncGenerator[Piece, None]:
    """One sequence's text. Closing it, or finding a stop string, aborts the sequence."""
    last: int | None = None
    async with aclosing(served.engine.stream(choice.submit)) as events:
        async for event in events:
            match event:
                case PromptLogprobs():
                    transcript.score_prompt(event.logprobs)
                case Token(token_id=last):
                    clock.tick(event.queued)
                    transcript.add(last, event.logprobs)
                    if transcript.stop is not None:
                        yield transcript.take("stop", transcript.stop)
                        return
                    if transcript.has_text:
                        yield transcript.take()
                case Finished(reason=reason):
                    transcript.end()
                    if transcript.stop is not None:
                        yield transcript.take("stop", transcript.stop)
                        return
                    theirs = reason == "stop" and last is not None and last not in choice.own_ends
                    yield transcript.take(reason, last if theirs else None)


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
