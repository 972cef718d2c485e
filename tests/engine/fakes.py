"""An engine without a model: logits that are a hash of the text, read back through the KV blocks and adapter pages.

The fake runner keeps what a real one would: one entry per cache position. A sequence whose blocks were shared, lost or
misplaced, or whose adapter's pages were overwritten, gets other tokens than `solo` says.
"""

import hashlib
import threading
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch

from adapters.adapter import Adapter, Delta, Layout, Member, Site
from adapters.errors import AdapterError
from adapters.loader import READ_AHEAD, Loader
from adapters.pool import Pool
from server.engine.blocks import Blocks
from server.engine.engine import Engine
from server.engine.sampler import Pick, draw
from server.engine.scheduler import Limits, Residency, Scheduler
from server.engine.sequence import Finished, Logprobs, PromptLogprobs, Sampling, Sequence, Submit, Token

VOCAB = 24
BLOCK = 4
GROUP = "attn"
LAYOUT = Layout(
    (Site(GROUP, 4, (Member("layers.0.attn.q", 4),)), Site("mlp", 4, (Member("layers.0.mlp.up", 4),)))
)


def sample(logits, sequences, known=(), mask=None):
    """What `draw` gives, waited for."""
    return draw(logits, sequences, known, mask).picks()


def make_adapter(generation: str, rank: int = 8, mark: float | None = None) -> Adapter:
    """Every value of it is its mark, so that what lies in its pages tells whose they are."""
    if mark is None:
        mark = float(int(hashlib.sha256(generation.encode()).hexdigest()[:4], 16))
    factors = torch.full((rank, 4), mark)
    return Adapter(generation, (Delta(0, 0, factors, factors.clone(), mark),))


def logits_of(text: list[tuple[int, float]]) -> torch.Tensor:  # [VOCAB]
    """Next-token logits from (token, mark of the adapter it was computed with) pairs."""
    digest = hashlib.sha256(repr(text).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(VOCAB, generator=generator) * 2


def sampled(logits, sequences, **given) -> list[int | None]:
    """The tokens of `sample` alone."""
    return [pick and pick.token_id for pick in sample(logits, sequences, **given)]


def solo_picks(submit: Submit, mark: float = 0.0) -> list[Pick]:
    """What a sequence has to get, whatever runs beside it."""
    sequence, picks = Sequence.of(submit), []
    while True:
        logits = logits_of([(token, mark) for token in sequence.tokens])
        picks += sample(logits[None], [sequence])
        sequence.tokens.append(picks[-1].token_id)
        if sequence.finish_reason():
            return picks


def solo(submit: Submit, mark: float = 0.0) -> list[int]:
    """The tokens that a sequence has to get."""
    return [pick.token_id for pick in solo_picks(submit, mark)]


def logprobs_of(logits: torch.Tensor, token: int, top: int) -> Logprobs:
    """By the definition: sorted by likelihood, then by id."""
    values = logits.log_softmax(-1).tolist()
    ids = sorted(range(len(values)), key=lambda id: (-values[id], id))[:top]
    return Logprobs(values[token], tuple((id, values[id]) for id in ids))


def prompt_logprobs(submit: Submit, mark: float = 0.0) -> tuple[Logprobs, ...]:
    """What a sequence has to be told of its prompt."""
    text = [(token, mark) for token in submit.prompt]
    return tuple(
        logprobs_of(logits_of(text[:at]), submit.prompt[at], submit.sampling.prompt_logprobs)
        for at in range(1, len(text))
    )


class FakeRunner:
    """Stands for the model and its cache. `poison` tokens make a step raise; `gate` holds steps back."""

    def __init__(self, pool: Pool, blocks: int) -> None:
        self.pool = pool
        self.cache: list[tuple[int, float] | None] = [None] * (blocks * BLOCK)
        self.poison: dict[int, BaseException] = {}
        self.broken: set[int] = set()  # tokens after which the logits are not numbers
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.steps = []  # the rows of every step that did not raise
        self._written = None, None
        self.prepared = 0  # steps that were written beforehand
        self.launches = True

    def prepare(self, inputs):
        """As on a device: all but the token ids is written now, and `forward` sends what was written."""
        self._written = inputs, deepcopy(inputs)
        return self.launches

    def forward(self, inputs):
        self.entered.set()
        assert self.gate.wait(30), "a test held the runner back for too long"
        prepared, written = self._written
        if prepared is inputs:
            self.prepared += 1
            inputs = replace(written, token_ids=inputs.token_ids)
        marks = self._marks(inputs)
        for token, at, place, mark in zip(
            inputs.token_ids.tolist(), inputs.positions.tolist(), inputs.kv_index.tolist(), marks, strict=True
        ):
            assert place >= BLOCK, "the padding block belongs to nobody"
            assert place % BLOCK == at % BLOCK
            self.cache[place] = (token, mark)
        for token in inputs.token_ids.tolist():
            if token in self.poison:
                raise self.poison[token]
        self.steps.append(inputs)
        wanted = [self._logits(row, inputs.spans) for row in inputs.logits_rows.tolist()]
        return torch.stack(wanted) if wanted else torch.empty(0, VOCAB)

    def _marks(self, inputs):
        """The adapter of each row, as its pages say; 0 for the base."""
        marks = [0.0] * len(inputs.token_ids)
        pages = self.pool.sites[0]
        for segment in inputs.segments.get(GROUP, ()):
            found = {float(pages.scale[page, 0]) for page in segment.pages}
            found |= {float(pages.a[page, 0, 0, 0]) for page in segment.pages}
            assert len(found) == 1, "pages of different adapters in one segment"
            marks[segment.start : segment.end] = [found.pop()] * (segment.end - segment.start)
        return marks

    def _logits(self, row, spans):
        span = next(span for span in spans if span.start <= row < span.end)
        length = span.kv_length - (span.end - 1 - row)
        text = [self.cache[span.blocks[at // BLOCK] * BLOCK + at % BLOCK] for at in range(length)]
        logits = logits_of(text)
        return torch.full_like(logits, torch.nan) if self.broken & {token for token, _ in text} else logits


class FakeLoader:
    """Reads end when the test says so; `line` is who waits, as it was last told."""

    def __init__(self, adapters: dict[str, Adapter]) -> None:
        self.adapters = adapters
        self.here: set[str] = set()
        self.reading: list[str] = []
        self.failed: set[str] = set()
        self.line: list[str] = []

    def line_up(self, generations):
        self.line = list(generations)

    def read_ahead(self):
        for generation in list(dict.fromkeys(self.line))[:READ_AHEAD]:
            if generation not in (*self.here, *self.failed, *self.reading):
                self.reading.append(generation)

    def get(self, generation, since=0.0):
        if generation in self.failed:
            self.failed.remove(generation)
            raise AdapterError("adapter_load_failed", f"{generation} could not be read")
        if generation in self.here:
            return self.adapters[generation]
        if generation not in self.reading:
            self.reading.append(generation)
        return None

    def end_read(self, *, well=True):
        generation = self.reading.pop(0)
        (self.here if well else self.failed).add(generation)

    def check(self):
        assert not self.here & set(self.reading)


class Parts:
    """Every owner of an engine around a fake runner."""

    def __init__(self, adapters, *, blocks=32, pages=4, sequences=4, tokens=16, chunk=8, loader=None):
        self.adapters = {adapter.generation: adapter for adapter in adapters}
        self.pool = Pool(LAYOUT, dict.fromkeys(LAYOUT.groups, pages), torch.float32, "cpu")
        self.loader = loader or FakeLoader(self.adapters)
        self.residency = Residency(self.loader, self.pool)
        self.blocks = Blocks(blocks)
        self.scheduler = Scheduler(Limits(sequences, tokens, chunk, BLOCK), self.blocks, self.residency)
        self.runner = FakeRunner(self.pool, blocks)

    def mark(self, generation):
        return self.adapters[generation].deltas[0].scale if generation else 0.0

    def solo(self, submit):
        return solo(submit, self.mark(submit.generation))

    def solo_events(self, submit):
        """All that a stream of it has to give before its end."""
        mark, name = self.mark(submit.generation), submit.request_id
        tokens = [Token(name, pick.token_id, pick.logprobs) for pick in solo_picks(submit, mark)]
        if submit.sampling.prompt_logprobs is None:
            return tokens
        return [PromptLogprobs(name, prompt_logprobs(submit, mark)), *tokens]


class Bench(Parts):
    """A running engine over the parts, with a real loader whose reads can fail."""

    def __init__(self, adapters=(), *, max_queued=16, **sizes):
        self.unreadable: set[str] = set()
        loader = Loader(self._read, 1 << 20, lambda: self.engine.wake())
        super().__init__(adapters, loader=loader, **sizes)
        self.engine = Engine(self.runner, self.scheduler, max_queued=max_queued)

    def __enter__(self):
        self.engine.start()
        return self

    def __exit__(self, *_):
        self.runner.gate.set()
        self.engine.stop(30)
        self.loader.close()
        assert not self.engine.healthy

    def _read(self, generation):
        if generation in self.unreadable:
            raise AdapterError("adapter_load_failed", f"{generation} could not be read")
        return self.adapters[generation]

    def assert_nothing_is_held(self):
        """Meant for after `stop`: the engine's thread is gone."""
        self.engine.check()
        assert self.blocks.used == 0
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        for generation in self.pool.residents:
            self.pool.forget(generation)
        assert self.pool.used == 0, "a page is still pinned"
        assert self.engine.stats().waiting == 0


def submit(request_id, prompt=(5, 6, 7), *, generation=None, max_tokens=6, **sampling) -> Submit:
    """Greedy unless told otherwise."""
    return Submit(
        request_id, tuple(prompt), Sampling(max_tokens, **({"temperature": 0.0} | sampling)), generation
    )


def sequence(prompt=(5, 6, 7), *, output=(), generation=None, name="s", **sampling) -> Sequence:
    made = Sequence.of(submit(name, prompt, generation=generation, **sampling))
    made.tokens.extend(output)
    return made


async def read_events(engine, asked):
    """All events of a stream but the last, and the last."""
    events = []
    async for event in engine.stream(asked):
        assert not (events and isinstance(events[-1], Finished)), "something came after the end"
        assert event.request_id == asked.request_id
        events.append(event)
    *others, last = events
    assert isinstance(last, Finished)
    return others, last


async def read(engine, asked):
    """All tokens of a stream and its last event."""
    events, last = await read_events(engine, asked)
    return [event.token_id for event in events if isinstance(event, Token)], last


def step_inputs_rows(inputs) -> np.ndarray:
    """(token, position, place) of every row."""
    return np.stack([inputs.token_ids, inputs.positions, inputs.kv_index], axis=1)
