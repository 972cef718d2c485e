"""The same streams over HTTP, against a server of its own in another process. Knows the API and nothing else."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from loadtests.server_process import serving
from tests.bench.contestants import PROMPT
from tests.bench.random_llama import Checkpoint


@dataclass(frozen=True)
class Streams:
    """A client with an adapter for each of its streams."""

    client: httpx.Client
    pool: ThreadPoolExecutor
    names: list[str]
    vocabulary: int
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    cpu_seconds: list[float] = field(default_factory=list)  # the client's, of each measurement

    def tokens_per_s(self, tokens: int) -> float:
        """Tokens of all streams over the time from the first's request to the last's end."""
        began, cpu = time.perf_counter(), time.process_time()
        list(self.pool.map(self._one, self.names, [tokens] * len(self.names)))
        self.cpu_seconds.append(time.process_time() - cpu)
        return len(self.names) * tokens / (time.perf_counter() - began)

    def _one(self, name: str, tokens: int) -> None:
        body = {
            "model": name,
            "prompt": [self.draw.randrange(3, self.vocabulary) for _ in range(PROMPT)],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        with self.client.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            events = sum(line.startswith("data: {") for line in reply.iter_lines())
        assert events >= tokens, f"{name} gave {events} events for {tokens} tokens"


@contextmanager
def streams_over_http(made: Checkpoint, count: int) -> Iterator[Streams]:
    """That many streams, and a server whose adapters are all in place."""
    names = [path.name for path in made.adapters[:count]]
    flags = [flag for path in made.adapters[:count] for flag in ("--lora-modules", f"{path.name}={path}")]
    flags += ["--quantized-cache", str(made.base.parent / "quantized"), "--kv-cache-memory-bytes", "1GiB"]
    flags += ["--adapter-dtype", "bfloat16", "--max-loras", "32"]
    with (
        serving(made.base, *flags) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
        ThreadPoolExecutor(count) as pool,
    ):
        streams = Streams(client, pool, names, made.shape.vocabulary)
        streams.tokens_per_s(2)
        streams.cpu_seconds.clear()
        yield streams
