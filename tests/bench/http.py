"""The same streams over HTTP, against a server of its own in another process. Knows the API and nothing else."""

from __future__ import annotations

import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from loadtests.server_process import serving
from tests.bench.contestants import PROMPT
from tests.bench.random_llama import Checkpoint


def http_tokens_per_s(made: Checkpoint, streams: int, tokens: int, rounds: int) -> tuple[float, float]:
    """The median over rounds of all streams' tokens per second, and the client's CPU seconds in a median round."""
    names = [path.name for path in made.adapters[:streams]]
    flags = [flag for path in made.adapters[:streams] for flag in ("--lora-modules", f"{path.name}={path}")]
    flags += ["--quantized-cache", str(made.base.parent / "quantized"), "--kv-cache-memory-bytes", "1GiB"]
    flags += ["--adapter-dtype", "bfloat16", "--max-loras", "32"]
    draw = random.Random(0)

    def one(client: httpx.Client, name: str) -> None:
        body = {
            "model": name,
            "prompt": [draw.randrange(3, made.shape.vocabulary) for _ in range(PROMPT)],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        with client.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            events = sum(line.startswith("data: {") for line in reply.iter_lines())
        assert events >= tokens, f"{name} gave {events} events for {tokens} tokens"

    rates, seconds = [], []
    with (
        serving(made.base, *flags) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
        ThreadPoolExecutor(streams) as pool,
    ):
        for number in range(rounds + 1):  # the first reads the adapters, and is not counted
            began, cpu = time.perf_counter(), time.process_time()
            list(pool.map(lambda name: one(client, name), names))
            if number:
                rates.append(streams * tokens / (time.perf_counter() - began))
                seconds.append(time.process_time() - cpu)
    return statistics.median(rates), statistics.median(seconds)
