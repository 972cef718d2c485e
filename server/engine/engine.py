"""The loop: take commands, schedule, run, sample, hand the events over. One thread, which owns the model.

Runs without HTTP: `async for event in engine.stream(submit)`. Knows nothing of text or of adapters' names.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain

import torch

from adapters.threads import compute_on
from server.engine.batch import Inputs, in_row_order
from server.engine.sampler import Drawn, Known, Pick, draw
from server.engine.scheduler import Scheduled, Scheduler
from server.engine.sequence import (
    Abort,
    Command,
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    Forget,
    PromptLogprobs,
    Sequence,
    StepCounts,
    Stop,
    Submit,
    Token,
    Wake,
)
from server.errors import (
    AdapterRejectedError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    LoraplexError,
    QueueFullError,
)
from server.model.device_runner import DeviceRunner
from server.model.runner import Runner

logger = logging.getLogger(__name__)


_Queue = asyncio.Queue[Event]
_UNREAD = 4  # times as many answers as may be under way are held for clients that are slow to read


class Streams:
    """The open streams by request id; opened and closed on event loops, fed from the engine's thread.

    A stream is open until its last event is delivered: a reader that is slow to take that holds no place. What it has
    not taken is held for it, so readers are counted too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[asyncio.AbstractEventLoop, _Queue]] = {}
        self.readers = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request_id: str) -> _Queue:
        """A queue for the running event loop; the id must not be open already."""
        queue: _Queue = asyncio.Queue()
        with self._lock:
            assert request_id not in self._open, f"request id {request_id} is in use"
            self._open[request_id] = (asyncio.get_running_loop(), queue)
            self.readers += 1
        return queue

    def close(self, request_id: str) -> None:
        """Its reader has gone."""
        with self._lock:
            self._open.pop(request_id, None)
            self.readers -= 1

    def ids(self) -> list[str]:
        with self._lock:
            return list(self._open)

    def deliver(self, events: Iterable[Event]) -> None:
        """Hand a step's events over; those of closed streams are dropped, their readers are gone."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Queue, Event]]] = {}
        with self._lock:
            for event in events:
                if event.request_id in self._open:
                    loop, queue = self._open[event.request_id]
                    by_loop.setdefault(loop, []).append((queue, event))
                    if isinstance(event, Finished | Failed):
                        del self._open[event.request_id]
        for loop, pairs in by_loop.items():
            with suppress(RuntimeError):  # the loop has closed, and its readers with it
                loop.call_soon_threadsafe(_put_all, pairs)


def _put_all(pairs: list[tuple[_Queue, Event]]) -> None:
    for events, event in pairs:
        events.put_nowait(event)


class Engine:
    """Runs sequences of many adapters in shared steps."""

    def __init__(
        self,
        runner: Runner | DeviceRunner,
        scheduler: Scheduler,
        *,
        max_queued: int,
        threads: int | None = None,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.residency = scheduler.residency
        self.max_open = scheduler.limits.sequences + max_queued
        self._threads = threads
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._streams = Streams()
        self.inputs = Inputs(runner, scheduler)
        self._untold: list[Iterable[Event]] = []
        self._counts = StepCounts()  # written by the engine's thread alone
        self._thread = threading.Thread(target=self._loop, name="loraplex-engine", daemon=True)
        self._stopped = False

    @property
    def healthy(self) -> bool:
        """Whether the loop is running."""
        return self._thread.is_alive() and not self._stopped

    def start(self) -> None:
        self._thread.start()

    def send(self, command: Command) -> None:
        """Put a command into the inbox, the only way in; from any thread."""
        self._inbox.put(command)

    def stop(self, timeout: float = 10.0) -> None:
        """End every sequence with an error and wait for the loop to leave."""
        self.send(Stop())
        self._thread.join(timeout)

    def wake(self) -> None:
        """Look at the waiting sequences again; called by loader threads."""
        self.send(Wake())

    def forget(self, generation: str) -> None:
        """Nobody holds this generation any more; its pages go when no running sequence reads them."""
        self.send(Forget(generation))

    async def stream(self, submit: Submit) -> AsyncGenerator[PromptLogprobs | Token | Finished, None]:
        """The sequence's tokens, then one `Finished`. Closing the iterator early aborts the sequence.

        Before them all come the prompt's logprobs, if they were asked for.

        Raises `QueueFullError` when too many wait, `InvalidRequestError` for what could never run, and the error of a
        sequence that failed.
        """
        self._refuse_unrunnable(submit)
        if len(self._streams) >= self.max_open:
            raise QueueFullError(f"{len(self._streams)} sequences are running or waiting; try again shortly")
        if self._streams.readers >= _UNREAD * self.max_open:
            raise QueueFullError(
                f"{self._streams.readers} answers are not read to their ends; try again when clients have read them"
            )
        events = self._streams.open(submit.request_id)
        event: Event | None = None
        try:
            if self._stopped:  # looked at only now: a loop that stops later tells every open stream
                raise EngineDeadError("the engine has stopped; the server has to be started again")
            self.send(submit)
            while not isinstance(event, Finished):
                event = await events.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
        finally:
            self._streams.close(submit.request_id)
            if not isinstance(event, Finished | Failed):
                self.send(Abort(submit.request_id))

    def _refuse_unrunnable(self, submit: Submit) -> None:
        if not submit.prompt:
            raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
        room = (self.scheduler.blocks.total - 1) * self.scheduler.limits.block_size
        if len(submit.prompt) + submit.sampling.max_tokens > room:
            raise ContextLengthError(
                f"{len(submit.prompt)} prompt tokens and {submit.sampling.max_tokens} to come are more than the "
                f"{room} that the KV cache holds; shorten the prompt or lower max_tokens",
                param="prompt",
            )

    def stats(self) -> EngineStats:
        """Levels and counters as of now, from any thread."""
        scheduler, pool = self.scheduler, self.residency.pool
        residents = pool.residents
        wanted = dict.fromkeys(sequence.generation for sequence in tuple(scheduler.waiting))
        return EngineStats(
            counts=replace(self._counts),
            running=len(scheduler.running),
            waiting=max(0, len(self._streams) - len(scheduler.running)),
            kv_blocks_used=scheduler.blocks.used,
            kv_blocks_total=scheduler.blocks.total - 1,
            kv_block_size=scheduler.limits.block_size,
            pages_used=pool.used,
            pages_total=pool.total,
            resident=residents,
            waiting_for=tuple(each for each in wanted if each is not None and each not in residents),
            adapter_room=pool.room,
            adapter_copies=pool.load_seconds,
            adapter_evictions=pool.evictions,
            adapter_hits=self.residency.hits,
            adapter_misses=self.residency.misses,
            prefix_tokens=scheduler.prefix_tokens,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
        )

    def check(self) -> None:
        """Assert the invariants of every owner; meant for a quiet moment."""
        self.scheduler.check()
        self.residency.pool.check()
        self.residency.loader.check()

    def _loop(self) -> None:
        if self._threads is not None:
            compute_on(self._threads)
        try:
            idle = True
            while self.take_commands(wait=idle):
                before = self._counts.steps
                self.step()
                idle = self._counts.steps == before  # only a command can change that now
        except BaseException:
            logger.exception("the engine stopped on an error it could not contain")
        finally:
            self._stopped = True
            try:
                self._tell()
            except Exception:  # the streams' end must not depend on it
                logger.exception("what the last step drew could not be told")
            error = EngineDeadError("the engine has stopped")
            self._streams.deliver([Failed(request_id, error) for request_id in self._streams.ids()])

    def step(self) -> None:
        """Schedule, run, sample. The step before is told of while this one runs, or first where it cannot run yet."""
        started = time.perf_counter()
        batch = in_row_order(self.scheduler.schedule())
        self._untold.append(self._rejected())
        if not self.inputs.only_launches(batch):
            self._tell()
        if batch:
            before = self._counts.prefill_tokens
            self._run(batch)
            self._count(batch, self._counts.prefill_tokens - before, time.perf_counter() - started)

    def _tell(self) -> None:
        """Hand over what has happened since it was done last."""
        untold, self._untold = self._untold, []
        self._streams.deliver(list(chain.from_iterable(untold)))

    def take_commands(self, *, wait: bool) -> bool:
        """Carry out everything in the inbox, after waiting for something if asked. False when told to stop."""
        commands = [self._inbox.get()] if wait else []
        while not self._inbox.empty():
            commands.append(self._inbox.get())
        for command in commands:
            match command:
                case Submit():
                    self.scheduler.add(Sequence.of(command))
                case Abort(request_id):
                    self._abort(request_id)
                case Forget(generation):
                    self.residency.pool.forget(generation)
                case Wake():
                    pass
                case Stop():
                    return False
        return True

    def _run(self, batch: list[Scheduled]) -> None:
        """One forward pass. If it raises, each half runs again alone, down to the sequence at fault."""
        try:
            inputs = self.inputs.of(batch)
            logits = self.runner.forward(inputs)
            drawing = [item.sequence for item in batch if item.samples]
            drawn = draw(logits, drawing, _known(batch))
            self.inputs.foresee(batch, inputs)
            self._tell()
            token_ids = drawn.token_ids()
        except torch.AcceleratorError:
            raise  # the device is in an unknown state: nothing can be retried
        except Exception:
            if len(batch) == 1:
                logger.exception("a sequence failed request_id=%s", batch[0].sequence.request_id)
                message = "the model failed on this request; the server's log has the reason"
                self._untold.append([self._fail(batch[0].sequence, LoraplexError(message))])
                return
            half = len(batch) // 2
            self._run(batch[:half])
            self._run(batch[half:])
            return
        self._settle(batch, drawing, drawn, token_ids)

    def _settle(
        self, batch: list[Scheduled], drawing: list[Sequence], drawn: Drawn, token_ids: list[int]
    ) -> None:
        """What a step has computed is the sequences' own; to be told later."""
        ends: dict[Sequence, Event] = {}
        if len(token_ids) > len(drawing):
            broken = _keep_prompt_logprobs(batch, drawn.picks()[len(drawing) :])
            ends = {sequence: self._fail_broken(sequence) for sequence in broken}
        for item in batch:
            self._counts.prefill_tokens += item.prompt_tokens
            self._counts.decode_tokens += item.count - item.prompt_tokens
            item.sequence.computed += item.count
        for sequence, token_id in zip(drawing, token_ids, strict=False):
            if sequence not in ends:
                self._advance(sequence, token_id, ends)
        self._untold.append(_told(drawing, drawn, ends))

    def _advance(self, sequence: Sequence, token_id: int, ends: dict[Sequence, Event]) -> None:
        """Append a sampled token, and retire the sequence if it was the last."""
        if token_id < 0:
            ends[sequence] = self._fail_broken(sequence)
        elif not sequence.sampling.max_tokens:
            ends[sequence] = self._finish(sequence, "length")
        else:
            sequence.tokens.append(token_id)
            self._counts.generated_tokens += 1
            reason = sequence.finish_reason()
            if reason is not None:
                ends[sequence] = self._finish(sequence, reason)

    def _fail_broken(self, sequence: Sequence) -> Failed:
        message = "the model's logits are not finite; the adapter's weights may overflow on this base"
        return self._fail(sequence, LoraplexError(message))

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Finished:
        self.scheduler.retire(sequence)
        return Finished(sequence.request_id, reason, sequence.prompt_length, sequence.output_length)

    def _fail(self, sequence: Sequence, error: Exception) -> Failed:
        self.scheduler.retire(sequence)
        return Failed(sequence.request_id, error)

    def _abort(self, request_id: str) -> None:
        sequence = self.scheduler.find(request_id)
        if sequence is not None:  # it may have ended while the abort was on its way
            self.scheduler.retire(sequence)

    def _rejected(self) -> list[Event]:
        """Sequences whose adapter could not be read."""
        rejected, self.scheduler.rejected = self.scheduler.rejected, []
        return [Failed(s.request_id, AdapterRejectedError(error, param="adapter")) for s, error in rejected]

    def _count(self, batch: list[Scheduled], prompt_tokens: int, seconds: float) -> None:
        counts = self._counts
        counts.steps += 1
        counts.seconds += seconds
        if prompt_tokens:
            counts.prefill_steps += 1
            counts.prefill_seconds += seconds
        counts.last_sequences = len(batch)
        counts.last_adapters = len({item.sequence.generation for item in batch} - {None})


def _told(drawing: list[Sequence], drawn: Drawn, ends: dict[Sequence, Event]) -> Iterator[Event]:
    """What a step gave its sequences: read at leisure, but before the next step's tokens are appended."""
    for sequence, pick in zip(drawing, drawn.picks(), strict=False):
        sampling, end = sequence.sampling, ends.pop(sequence, None)
        if pick is not None and not isinstance(end, Failed):
            if sampling.prompt_logprobs is not None and sequence.output_length < 2:
                yield PromptLogprobs(sequence.request_id, tuple(sequence.prompt_logprobs))
            if sampling.max_tokens:
                yield Token(sequence.request_id, pick.token_id, pick.logprobs, queued=sequence.queued)
        if end is not None:
            yield end
    yield from ends.values()  # in the middle of a prompt


def _known(batch: list[Scheduled]) -> list[Known]:
    """The tokens that follow the rows of prompts in this step."""
    return [
        Known(item.sequence.tokens[position + 1], item.sequence.sampling.prompt_logprobs or 0)
        for item in batch
        for position in item.scores
    ]


def _keep_prompt_logprobs(batch: list[Scheduled], picks: list[Pick | None]) -> list[Sequence]:
    """Give each sequence the logprobs of its prompt; returns those whose logits are not numbers."""
    broken: list[Sequence] = []
    rows = iter(picks)
    for item in batch:
        found = [next(rows) for _ in item.scores]
        kept = [pick.logprobs for pick in found if pick is not None and pick.logprobs is not None]
        item.sequence.prompt_logprobs += kept
        if len(kept) < len(found):
            broken.append(item.sequence)
    return broken
