"""Stand-ins for the engine and the registry, which count what they are given and what they get back."""

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path

from adapters.entry import Entry, Put
from adapters.errors import AdapterError, Finding
from adapters.records import Version, check_name
from adapters.references import Reference
from adapters.tally import Tally
from server.config import Settings
from server.engine.sequence import EngineStats, Finished, Logprobs, PromptLogprobs, StepCounts, Token
from server.errors import QueueFullError
from server.serving import GenerationDefaults, Served, Serving
from server.text.tokenizer import Tokenizer
from tests.server.text import samples

ADAPTERS = {"legal": "1" * 64, "medical": "2" * 64}


def tally(*seconds):
    made = Tally()
    for each in seconds:
        made.add(each)
    return made


def logprobs_of(id, at, top):
    """Numbers that tell which token they are of, and where it stood; it is the second likeliest."""
    if top is None:
        return None
    likeliest = [(id + 1, -0.25 - at), (id, -0.5 - at), *[(id + k, -1.0 * k - at) for k in range(2, 20)]]
    return Logprobs(-0.5 - at, tuple(likeliest[:top]))


@dataclass
class FakeEngine:
    """Replies with the ids that `reply` gives for a submit, one per `delay` seconds, the first after `first`."""

    tokenizer: Tokenizer
    reply: object = None
    delay: float = 0.0
    first: float | None = None
    max_open: int = 100
    fail_after: int | None = None
    error: Exception = field(default_factory=lambda: RuntimeError("/secret/path exploded"))
    healthy: bool = True
    stopped: bool = False
    submits: list = field(default_factory=list)
    open: set = field(default_factory=set)
    aborted: int = 0

    def ids_for(self, submit):
        if self.reply is None:
            return self.tokenizer.encode(" the court grants relief")
        return self.reply(submit)

    async def stream(self, submit):
        if len(self.open) >= self.max_open:
            raise QueueFullError("too many wait")
        assert submit.request_id not in self.open
        self.submits.append(submit)
        self.open.add(submit.request_id)
        reason, count = "length", 0
        sampling, prompt = submit.sampling, submit.prompt
        try:
            if sampling.prompt_logprobs is not None:
                found = [logprobs_of(id, at, sampling.prompt_logprobs) for at, id in enumerate(prompt)]
                yield PromptLogprobs(submit.request_id, tuple(found[1:]))
            for id in self.ids_for(submit)[: submit.sampling.max_tokens]:
                await asyncio.sleep(self.delay if count or self.first is None else self.first)
                if self.stopped:
                    raise QueueFullError("the engine has stopped")
                if self.fail_after == count:
                    raise self.error
                count += 1
                scored = logprobs_of(id, len(prompt) + count - 1, sampling.logprobs)
                yield Token(submit.request_id, id, scored, queued=0.01)
                if id in submit.sampling.stop_token_ids:
                    reason = "stop"
                    break
            yield Finished(submit.request_id, reason, len(submit.prompt), count)
            reason = None
        finally:
            self.aborted += reason is not None
            self.open.discard(submit.request_id)

    def stop(self, timeout):
        self.stopped = True

    def stats(self):
        return EngineStats(
            running=len(self.open),
            waiting=1,
            kv_blocks_used=2,
            kv_blocks_total=8,
            kv_block_size=16,
            pages_used=3,
            pages_total=16,
            resident=(ADAPTERS["legal"],),
            waiting_for=(ADAPTERS["medical"],),
            adapter_room=4,
            counts=StepCounts(
                steps=7,
                seconds=0.5,
                prefill_steps=2,
                prefill_seconds=0.2,
                prefill_tokens=70,
                decode_tokens=30,
                generated_tokens=32,
                last_sequences=2,
                last_adapters=1,
            ),
            adapter_copies=tally(0.02),
            adapter_evictions=0,
            adapter_hits=5,
            adapter_misses=1,
            prefix_tokens=50,
            prefix_hits=20,
            preemptions=1,
        )


class FakeStore:
    """Work in progress in a folder of its own."""

    def __init__(self, root: Path):
        self.root = root
        self.count = 0
        self.closed = False

    def incoming(self):
        self.count += 1
        folder = self.root / str(self.count)
        folder.mkdir(parents=True)
        return folder

    def discard(self, folder):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()

    def close(self):
        self.closed = True


class FakeRegistry:
    """Names in a dict; `held` is the number of references that nobody has released."""

    def __init__(self, root: Path):
        self.store = FakeStore(root)
        self.names = dict(ADAPTERS)
        self.stored_bytes = 8192
        self.uploaded_bytes = 4096
        self.held = 0
        self.resolved = 0
        self.refused = None
        self._lock = threading.Lock()

    def resolve(self, name, key=None):
        entry = self.entry(name)
        if entry.state == "incompatible":
            raise AdapterError("adapter_incompatible", f"{name} does not fit", entry.findings)
        released = []

        def release(reference):
            with self._lock:
                self.held -= not released
                released.append(reference)

        with self._lock:
            self.held += 1
            self.resolved += 1
        return Reference(name, self.names[name], release)

    def __contains__(self, name):
        return name in self.names

    def entry(self, name):
        if name not in self:
            raise AdapterError("adapter_not_found", f"no adapter {name}")
        generation = self.names[name]
        state = "incompatible" if name == "odd" else "ready"
        return Entry(
            name,
            generation,
            1,
            100,
            200,
            4096,
            8,
            ("q_proj",),
            "base",
            state,
            self.held,
            (Finding("a", "b"),),
        )

    def entries(self):
        return [self.entry(name) for name in sorted(self.names)]

    def put_archive(self, name, archive, if_match=None):
        check_name(name)
        if self.refused is not None:
            raise self.refused
        self._match(name, if_match)
        generation = archive.read_bytes().hex()[:64].ljust(64, "0")
        created = self.names.get(name) != generation
        self.names[name] = generation
        return Put(self.entry(name), created)

    def put_parts(self, name, parts, if_match=None):
        self.parts = [(sent_as, path.read_bytes()) for sent_as, path in parts]
        return self.put_archive(name, parts[0][1], if_match)

    def versions(self, name):
        return [Version(3, self.entry(name).generation, 300), Version(1, "a" * 64, 100)]

    def rollback(self, name, to, if_match=None):
        self._match(name, if_match)
        found = [version for version in self.versions(name) if to in (version.revision, version.generation)]
        if not found:
            raise AdapterError("adapter_not_found", f"adapter {name} has no version {to}")
        self.names[name] = found[0].generation
        return self.entry(name)

    def delete(self, name, if_match=None):
        self.entry(name)
        self._match(name, if_match)
        del self.names[name]

    def _match(self, name, if_match):
        if if_match is not None and self.names.get(name) != if_match:
            raise AdapterError("precondition_failed", f"{name} is at another generation")


@dataclass
class FakeLoader:
    """Levels only."""

    nbytes: int = 1000
    cached: int = 1
    evictions: int = 0
    failures: int = 1
    load_seconds: Tally = field(default_factory=lambda: tally(0.3))
    closed: bool = False

    def close(self):
        self.closed = True


@dataclass
class World:
    """A served model of fakes, and the settings it is served with."""

    settings: Settings
    serving: Serving
    engine: FakeEngine
    registry: FakeRegistry
    tokenizer: Tokenizer

    def quiet(self):
        """Whether nothing is held and nothing runs."""
        return self.registry.held == 0 and not self.engine.open


def world(root: Path, **settings) -> World:
    """Everything ready, with the adapters `legal` and `medical`."""
    backend = samples.byte_level.__wrapped__()
    backend.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = Tokenizer(backend)
    engine, registry = FakeEngine(tokenizer), FakeRegistry(root)
    served = Served(
        name="base",
        created=1,
        max_model_len=64,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=frozenset({backend.eos_token_id}),
        defaults=GenerationDefaults(0.5, 0.9, 20, min_p=0.1, repetition_penalty=1.2),
        tokenizer=tokenizer,
        engine=engine,
        registry=registry,
        loader=FakeLoader(),
    )
    serving = Serving(phase="ready", progress=1.0, served=served)
    return World(Settings(model="/models/base", **settings), serving, engine, registry, tokenizer)
