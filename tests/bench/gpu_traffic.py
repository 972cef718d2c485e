"""What an upload costs those who are being served: the whole server in this process, the uploader in another.

Tokens are timed where the event loop gets them. Knows no bounds.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from transformers import PreTrainedModel

from adapters.packing import pack
from server.api.app import create_app
from server.config import Settings
from server.engine.sequence import Sampling, Submit, Token
from server.memory_plan import plan_memory
from server.model.device_runner import DeviceRunner
from server.model.kernel_set import Kernels
from server.model.servable import make_servable
from server.process import leave_steps_alone
from server.serving import Served, Serving
from server.startup import assemble, open_store
from server.text.tokenizer import Tokenizer
from tests.bench.random_llama import Shape, make_adapter, make_tokenizer

_PROMPT = 32  # tokens


@dataclass(frozen=True)
class Gaps:
    """The time between two tokens of a stream, in seconds."""

    tokens: int
    median: float
    p99: float  # the 99th percentile

    @classmethod
    def of(cls, moments: list[list[float]], since: float, until: float) -> Gaps:
        """Of the tokens that came between two times, by the times of each stream's tokens."""
        found = [
            later - earlier
            for stream in moments
            for earlier, later in pairwise(stream)
            if since <= later <= until
        ]
        if not found:
            return cls(0, float("nan"), float("nan"))
        return cls(len(found), float(np.median(found)), float(np.percentile(found, 99)))


@dataclass(frozen=True)
class Disturbance:
    """What streams saw of an upload."""

    quiet: Gaps  # before it
    during: Gaps  # from its first byte until the adapter was on the device
    stages: dict[str, Gaps]  # of that time, in order; those in which a token came
    seconds: float


@contextmanager
def served(
    model: PreTrainedModel, kernels: Kernels, shape: Shape, folder: Path, streams: int
) -> Iterator[tuple[Settings, Serving]]:
    """The server's parts around a model that is here already."""
    make_tokenizer(shape, folder / "tokenizer")
    settings = Settings(
        model=str(folder / "tokenizer"),
        served_model_name="base",
        adapter_store=folder / "store",
        max_num_seqs=streams + 1,
        max_num_batched_tokens=_PROMPT,  # captured up to there
        prefill_chunk=_PROMPT // 2,
        max_lora_rank=32,
        max_loras=8,
        adapter_dtype="bfloat16",
        max_model_len=4096,
        kv_cache_memory_bytes=1 << 33,
    )
    servable = make_servable(model, kernels=kernels, max_model_len=settings.max_model_len)
    plan = plan_memory(settings, servable)
    made: Served = assemble(settings, servable, plan, Tokenizer.load(settings.model), open_store(settings))
    assert isinstance(made.engine.runner, DeviceRunner)
    made.engine.runner.capture(lambda done, total: None)
    made.engine.start()
    try:
        yield settings, Serving(phase="ready", progress=1.0, detail="ready", served=made)
    finally:
        made.engine.stop()
        made.loader.close()
        made.registry.store.close()


def disturbances(
    model: PreTrainedModel,
    kernels: Kernels,
    shape: Shape,
    *,
    rank: int,
    repeats: int,
    streams: int,
    tokens: int,
) -> list[Disturbance]:
    """Upload and load an adapter of that rank on all linears, `repeats` times, beside running streams."""
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name, _uploader() as uploader:
        folder = Path(name)
        files = _archives(shape, folder, rank, repeats)
        with served(model, kernels, shape, folder, streams) as (settings, serving):
            try:
                loop = uvicorn.Config("").get_loop_factory()  # the server's
                with asyncio.Runner(loop_factory=loop) as runner:
                    return runner.run(_measure(settings, serving, uploader, files, streams, tokens))
            finally:
                gc.unfreeze()  # what was served is garbage now, and the next part wants its memory


def _archives(shape: Shape, folder: Path, rank: int, count: int) -> list[Path]:
    """So many adapters, each the tar that `loraplex adapters put` sends; they differ in their last weight."""
    made = folder / "adapter"
    make_adapter(shape, made, 100, rank)
    archives = []
    for number in range(count):
        with (made / "adapter_model.safetensors").open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(bytes((number, 60)))  # a bfloat16 about 0.01
        archives.append(folder / f"adapter-{number}.tar")
        with archives[-1].open("wb") as file:
            for part in pack(made):
                file.write(part)
    return archives


@contextmanager
def _uploader() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.bench.gpu_uploader"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


@dataclass(frozen=True)
class _Case:
    """A running server and a client that waits for its word."""

    made: Served
    uploader: subprocess.Popen[str]
    port: int
    streams: int
    tokens: int  # that are timed of each stream before the upload

    async def once(self, name: str, file: Path) -> Disturbance:
        """Streams begin; they are timed alone, then beside an upload until the new adapter's pages are written.

        What ends a stream ends all of it: nobody waits for tokens that will not come.
        """
        moments: list[list[float]] = [[] for _ in range(self.streams)]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_stream(self.made, f"{name}-{i}", moments[i])) for i in range(self.streams)
            ]
            await _until(moments, 2 + self.tokens // 10)
            quiet_from = time.perf_counter()
            await _until(moments, 3 + self.tokens // 10 + self.tokens)
            quiet_until = time.perf_counter()
            reply = await asyncio.to_thread(_upload, self.uploader, f"{self.port} {name} {file}\n")
            assert reply["status"] in (200, 201), reply
            generation = self.made.registry.entry(name).generation
            pool = self.made.engine.residency.pool
            itself = group.create_task(_stream(self.made, f"{name}-itself", [], generation, tokens=1))
            while not (pool.arriving(generation) or generation in pool.residents or itself.done()):
                await asyncio.sleep(0.001)
            read = time.perf_counter()
            while not (generation in pool.residents or itself.done()):
                await asyncio.sleep(0.001)
            ready = time.perf_counter()
            await itself
            for task in tasks:
                task.cancel()
        times = [reply["began"], reply["sent"], reply["ended"], read, ready]
        stages = {
            name: Gaps.of(moments, *between)
            for name, between in zip(("received", "checked", "read", "copied"), pairwise(times), strict=True)
        }
        return Disturbance(
            quiet=Gaps.of(moments, quiet_from, quiet_until),
            during=Gaps.of(moments, times[0], ready),
            stages={name: gaps for name, gaps in stages.items() if gaps.tokens},
            seconds=ready - times[0],
        )


async def _measure(
    settings: Settings,
    serving: Serving,
    uploader: subprocess.Popen[str],
    files: list[Path],
    streams: int,
    tokens: int,
) -> list[Disturbance]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(settings, serving), log_config=None, access_log=False, lifespan="off"
        )
        server = uvicorn.Server(config)
        leave_steps_alone(asyncio.get_running_loop())
        serving_http = asyncio.create_task(server.serve(sockets=[listener]))
        case = _Case(serving.ready(), uploader, listener.getsockname()[1], streams, tokens)
        found = [await case.once(f"new-{number}", file) for number, file in enumerate(files)]
        server.should_exit = True
        await serving_http
    return found


async def _until(moments: list[list[float]], count: int) -> None:
    """Wait until every stream has so many tokens."""
    while not all(len(each) >= count for each in moments):
        await asyncio.sleep(0.005)


def _upload(uploader: subprocess.Popen[str], line: str) -> dict[str, Any]:
    assert uploader.stdin is not None
    assert uploader.stdout is not None
    uploader.stdin.write(line)
    uploader.stdin.flush()
    found: dict[str, Any] = json.loads(uploader.stdout.readline())
    return found


async def _stream(
    made: Served, name: str, moments: list[float], generation: str | None = None, tokens: int = 4000
) -> None:
    submit = Submit(name, tuple(range(3, 3 + _PROMPT)), Sampling(tokens, temperature=0), generation)
    async with aclosing(made.engine.stream(submit)) as events:
        async for event in events:
            if isinstance(event, Token):
                moments.append(time.perf_counter())
