"""Which sequences run in the next step, how many tokens of each, and that their adapters are there. Torch-free.

Decode first, then prefill in whole chunks, then admission in order of arrival. Chunks are cut at fixed multiples of
`prefill_chunk` from a sequence's start; the token budget only decides how many. Knows nothing of logits or clients.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from adapters.errors import AdapterError
from adapters.loader import Loader
from adapters.pool import Pool
from server.engine.blocks import Blocks, block_hash
from server.engine.sequence import Sequence


class Admission(Enum):
    """The answer to a sequence that wants to run."""

    READY = auto()  # resident and pinned
    LOADING = auto()  # being read from disk, or copied to the device; ask again when that has ended
    NO_ROOM = auto()  # pages are held by running sequences
    FOLLOWS = auto()  # a running sequence is computing the block that it would begin with


class Residency:
    """Pins of device pages, one per running sequence."""

    def __init__(self, loader: Loader, pool: Pool) -> None:
        self.loader = loader
        self.pool = pool
        self.hits = 0  # sequences that started with their adapter on the device already
        self.misses = 0  # and those for which it had to be copied there
        self._refused: set[str] = set()  # for want of pages, since any were let go
        self._let_go = 0  # the pool's count at the last line

    def acquire(self, generation: str | None, since: float = 0.0) -> Admission:
        """Pin a generation's pages if that can be done now; raises `AdapterError` when it cannot be read."""
        if generation is None:
            return Admission.READY
        if not self.pool.resident(generation):
            if self.pool.arriving(generation):
                return Admission.LOADING
            if generation in self._refused:
                return Admission.NO_ROOM
            adapter = self.loader.get(generation, since)
            if adapter is None:
                return Admission.LOADING
            if not self.pool.admit(adapter):
                self._refused.add(generation)
                return Admission.NO_ROOM
            if not self.pool.resident(generation):
                return Admission.LOADING
        if self.pool.unused(generation):
            self.misses += 1
        else:
            self.hits += 1
        self.pool.pin(generation)
        return Admission.READY

    def line_up(self, generations: Iterable[str | None]) -> None:
        """Tell the loader whose adapters are waited for, the most urgent first; it reads while they wait for seats.

        Who was refused is asked again only when a pin has been given back, a copy has ended or pages are free: a
        queue at a full pool would cost every step as many searches for pages.
        """
        wanted = [each for each in generations if each is not None and not self.pool.resident(each)]
        if self._let_go != self.pool.let_go:
            self._let_go = self.pool.let_go
            self._refused.clear()
        if wanted:  # an old line does no harm while nobody waits
            self.loader.line_up(wanted)
            self.loader.read_ahead()

    def release(self, generation: str | None) -> None:
        """Give back one pin."""
        if generation is not None:
            self.pool.unpin(generation)

    def pages(self, generation: str | None) -> Mapping[str, tuple[int, ...]]:
        """Group to page ids; empty for the base alone."""
        return {} if generation is None else self.pool.pages(generation)


MAX_PASSED = 32  # how many younger sequences may be admitted before one that found no room


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`count` next tokens of a sequence go into the step."""

    sequence: Sequence
    count: int

    @property
    def prompt_tokens(self) -> int:
        """How many of them are the prompt's."""
        return max(0, min(self.count, self.sequence.prompt_length - self.sequence.computed))

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's newest token, so that the next one is drawn."""
        return self.count == self.sequence.missing

    @property
    def decodes(self) -> bool:
        """Whether the newest token of the output goes in, and nothing else."""
        sequence = self.sequence
        return sequence.computed >= sequence.prompt_length and sequence.computed + 1 == len(sequence.tokens)

    @property
    def scores(self) -> range:
        """The positions in the prompt whose rows give logprobs of the tokens after them."""
        sequence = self.sequence
        end = min(sequence.computed + self.count, sequence.prompt_length - 1)
        return range(max(sequence.computed, sequence.scored), end)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one step may hold."""

    sequences: int
    tokens: int
    prefill_chunk: int
    block_size: int


@dataclass(slots=True)
class _Coming:
    """The blocks that running sequences compute next, by generation, and what is kept for those that wait for them."""

    hashes: defaultdict[str | None, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    seats: int = 0
    blocks: int = 0


class Scheduler:
    """Owner of the waiting and the running sequences."""

    def __init__(self, limits: Limits, blocks: Blocks, residency: Residency) -> None:
        self.limits = limits
        self.blocks = blocks
        self.residency = residency
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        # their adapters could not be read; the engine takes them
        self.rejected: list[tuple[Sequence, AdapterError]] = []
        self.prefix_tokens = 0  # of all prompts admitted, each counted once
        self.prefix_hits = 0  # of these, taken up from blocks that were there
        self.preemptions = 0
        self._foreseen: list[Scheduled] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step. Sequences without room for their next block make the youngest wait and start again."""
        if not self.waiting:
            if self._goes_on(self._foreseen):
                return self._foreseen
        else:
            self._remember_all()
        batch: list[Scheduled] = []
        budget, before = self.limits.tokens, len(self.running)
        for sequence in sorted(self.running, key=lambda s: s.missing > 1):
            if sequence.blocks:  # an older sequence may have taken them in this very loop
                budget -= self._grow(sequence, budget, batch)
        if len(self.running) == before:  # after a preemption nothing new starts: it would be the next to go
            self._admit(budget, batch)
        return [item for item in batch if item.sequence.blocks]

    def foresee(self, batch: list[Scheduled]) -> list[Scheduled]:
        """The step after `batch` if nothing comes between: a decode of all that do not end, in the same order.

        Takes the blocks for it; they are the sequences' own from then on. Empty where there is no such step.
        """
        self._remember_all()
        self._foreseen = []
        if len(batch) == len(self.running) and all(item.samples for item in batch):
            going = [item for item in batch if not item.sequence.ends]
            same = len(going) == len(batch) and all(item.count == 1 for item in batch)
            if self._take_blocks([item.sequence for item in going]):
                self._foreseen = batch if same else [Scheduled(item.sequence, 1) for item in going]
        return self._foreseen

    def retire(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and give back all it holds."""
        if sequence in self.running:
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)

    def find(self, request_id: str) -> Sequence | None:
        return next((s for s in (*self.running, *self.waiting) if s.request_id == request_id), None)

    def check(self) -> None:
        """Assert that every running sequence is within its blocks and nothing else holds any."""
        self.blocks.check(sequence.blocks for sequence in self.running)
        assert len(self.running) <= self.limits.sequences
        for sequence in self.running:
            assert sequence.computed <= len(sequence.blocks) * self.limits.block_size
            assert sequence.missing >= 1
        assert all(not sequence.blocks and sequence.computed == 0 for sequence in self.waiting)

    def _goes_on(self, batch: list[Scheduled]) -> bool:
        """Whether a step that was foreseen is what there is to do: only running sequences hold blocks."""
        size = self.limits.block_size
        if not batch or len(batch) != len(self.running):
            return False
        return all(
            len(each.tokens) - each.computed == 1 and each.computed < len(each.blocks) * size
            for each in [item.sequence for item in batch]
        )

    def _take_blocks(self, sequences: list[Sequence]) -> bool:
        """Blocks for the token after the one that is being drawn: for all, or for none."""
        wanted = [max(0, self._blocks_for(len(s.tokens) + 1) - len(s.blocks)) for s in sequences]
        if sum(wanted) > self.blocks.free:
            return False
        for sequence, count in zip(sequences, wanted, strict=True):
            if count:
                self.blocks.extend(sequence.blocks, count)
        return True

    def _grow(self, sequence: Sequence, budget: int, batch: list[Scheduled]) -> int:
        """Schedule a running sequence's next tokens, preempting younger ones for blocks; returns the tokens taken."""
        count = self._chunk(sequence, budget)
        if not count:
            return 0
        while not self._reserve(sequence, count):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return 0
        batch.append(Scheduled(sequence, count))
        return count

    def _admit(self, budget: int, batch: list[Scheduled]) -> None:
        """Start waiting sequences, oldest first; one that finds no room is passed by at most `MAX_PASSED` others.

        The first read of an adapter is not counted: it ends by itself, and a slow disk stops nobody else. One that
        has been passed and must be read again goes on counting, or it could be passed for ever.

        Equal beginnings are computed once: who follows another waits in the same way until its blocks are there, and
        its seat is kept for it.
        """
        self.residency.line_up(sequence.generation for sequence in self.waiting)
        if not self.waiting or len(self.running) >= self.limits.sequences:
            return
        passed_over: list[Sequence] = []
        enough = False
        coming = _Coming()
        for sequence in self.running:
            coming.hashes[sequence.generation] |= self._filling(sequence)
        for sequence in tuple(self.waiting):
            seats = len(self.running) + coming.seats
            if not self._chunk(sequence, budget) or seats >= self.limits.sequences:
                return
            try:
                admission = self._start(sequence, coming)
            except AdapterError as error:
                self.waiting.remove(sequence)
                self.rejected.append((sequence, error))
                continue
            match admission:
                case Admission.READY:
                    count = self._chunk(sequence, budget)  # again: part of the prompt may be there already
                    batch.append(Scheduled(sequence, count))
                    budget -= count
                    for older in passed_over:
                        older.passed += 1
                    enough = any(older.passed >= MAX_PASSED for older in passed_over)
                case Admission.LOADING | Admission.FOLLOWS if not sequence.passed:
                    pass
                case _:
                    passed_over.append(sequence)
                    enough = sequence.passed >= MAX_PASSED
            if enough:
                return

    def _start(self, sequence: Sequence, coming: _Coming) -> Admission:
        """Move a waiting sequence to the running ones if its adapter and blocks for all its tokens are there."""
        wanted = self._blocks_for(len(sequence.tokens))
        if wanted > self.blocks.free - coming.blocks:
            return Admission.NO_ROOM
        ahead = coming.hashes.get(sequence.generation)
        if ahead and self._first_unknown(sequence) in ahead:
            coming.seats += 1
            coming.blocks += wanted
            return Admission.FOLLOWS
        admission = self.residency.acquire(sequence.generation, sequence.arrived)
        if admission is Admission.READY:
            self._take_up_prefix(sequence)
            self._reserve(sequence, sequence.missing)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            if not sequence.queued:  # after a preemption it is no new prompt
                sequence.queued = time.perf_counter() - sequence.arrived
                self.prefix_tokens += sequence.prompt_length
                self.prefix_hits += sequence.computed
            coming.hashes[sequence.generation] |= self._filling(sequence)
        return admission

    def _take_up_prefix(self, sequence: Sequence) -> None:
        """Begin with the blocks that hold the same text of the same generation."""
        reused = self.blocks.reuse(sequence.blocks, self._reusable(sequence))
        sequence.remembered = reused
        sequence.computed = reused * self.limits.block_size

    def _reusable(self, sequence: Sequence) -> Iterator[bytes]:
        """The hashes of the full blocks that it need not compute itself, each made when it is asked for.

        The newest token is always computed, and so is all that logprobs of the prompt are still wanted from.
        """
        most = len(sequence.tokens) - 1
        if sequence.scored < sequence.prompt_length - 1:
            most = sequence.scored
        return (self._hash(sequence, index) for index in range(most // self.limits.block_size))

    def _first_unknown(self, sequence: Sequence) -> bytes | None:
        """The hash of the first block that it would compute and might have taken up."""
        return next((each for each in self._reusable(sequence) if not self.blocks.knows(each)), None)

    def _filling(self, sequence: Sequence) -> set[bytes]:
        """The hash of the block that a running sequence fills next, if it has the tokens for that."""
        index = sequence.remembered
        full = (index + 1) * self.limits.block_size <= len(sequence.tokens)
        return {self._hash(sequence, index)} if full else set()

    def _remember_all(self) -> None:
        for sequence in self.running:
            self._remember(sequence)

    def _remember(self, sequence: Sequence) -> None:
        """Let others take up the blocks that have become full."""
        full = sequence.computed // self.limits.block_size
        if full > sequence.remembered:
            for index in range(sequence.remembered, full):
                self.blocks.remember(sequence.blocks[index], self._hash(sequence, index))
            sequence.remembered = full

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """The hash of a full block, which is of all before it too."""
        size, known = self.limits.block_size, sequence.hashes
        while len(known) <= index:
            start = len(known) * size
            before = known[-1] if known else b""
            known.append(block_hash(before, sequence.tokens[start : start + size], sequence.generation))
        return known[index]

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it will compute its tokens again, before anything younger starts."""
        self.preemptions += 1
        self._give_back(sequence)
        sequence.computed = sequence.remembered = 0
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._remember(sequence)
        self.running.remove(sequence)
        self.residency.release(sequence.generation)
        self.blocks.release(sequence.blocks)

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """How many tokens go next: the one of a decode, or as many whole chunks as the budget holds."""
        if sequence.missing <= budget:
            return sequence.missing
        chunk = self.limits.prefill_chunk
        end = (sequence.computed + budget) // chunk * chunk
        return max(0, end - sequence.computed)

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        wanted = self._blocks_for(sequence.computed + count) - len(sequence.blocks)
        return wanted <= 0 or self.blocks.extend(sequence.blocks, wanted)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)
