"""Clients that go at any moment leave nothing in the server: no task, block, page or reference.

The server runs on a thread of this process, so that its tasks can be counted and its owners asked.
"""

import asyncio
import random
import time
from contextlib import suppress

import openai
import pytest

from server.api.app import create_app
from server.config import Settings
from server.config_values import MIB
from server.serving import Serving
from server.startup import load
from tests.clients.conftest import ADAPTERS, DEMO
from tests.server.live import listening

STREAMS = 64
PROMPT = "Q: What is discharge?\nA:"


@pytest.fixture
def running(tmp_path):
    settings = Settings(
        model=str(DEMO / "base"),
        served_model_name="base",
        adapter_store=tmp_path / "store",
        quantized_cache=tmp_path / "quantized",
        lora_modules=[f"{name}={DEMO}/adapters/{name}" for name in ADAPTERS],
        device="cpu",
        threads=1,
        max_num_seqs=16,
        adapter_memory_bytes=64 * MIB,
        kv_cache_memory_bytes=64 * MIB,
    )
    serving = Serving()
    load(settings, serving)
    with listening(create_app(settings, serving)) as live:
        yield live, serving.served
    serving.served.engine.stop()
    serving.served.loader.close()
    serving.served.registry.store.close()


async def leave(client: openai.AsyncOpenAI, number: int, moments: random.Random) -> None:
    """One request that is left: a stream closed after some chunks, or any request cancelled after some time."""
    given = {"model": ("base", *ADAPTERS)[number % 4], "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    chunks, seconds = moments.randrange(5), moments.uniform(0, 3)

    async def ask() -> None:
        if number % 3 == 0:
            await client.completions.create(prompt=PROMPT, n=2, **given)
            return
        if number % 3 == 1:
            stream = await client.completions.create(prompt=PROMPT, stream=True, **given)
        else:
            messages = [{"role": "user", "content": PROMPT}]
            stream = await client.chat.completions.create(messages=messages, stream=True, **given)
        async with stream:
            for _ in range(chunks):
                await anext(stream)

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(ask(), seconds)


# A client generator dropped in mid-close says so when the collector finds it: the client's own, not the server's.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <async_generator object (AsyncResponseStream|BoundAsyncStream|Response|AsyncStream)"
    ":pytest.PytestUnraisableExceptionWarning"
)
def test_streams_left_at_random_leave_nothing_behind(running):
    live, served = running
    engine = served.engine
    before = live.tasks()
    seen = set()

    async def watch() -> None:
        """That there was something to leave behind."""
        while True:
            stats = engine.stats()
            held = sum(entry.references for entry in served.registry.entries())
            things = {
                "running": stats.running,
                "waiting": stats.waiting,
                "blocks": stats.kv_blocks_used,
                "held": held,
            }
            seen.update(name for name, count in things.items() if count)
            await asyncio.sleep(0.01)

    async def all_of_them() -> None:
        watching = asyncio.create_task(watch())
        moments = random.Random(11)
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(leave(client, number, moments) for number in range(STREAMS)))
        watching.cancel()

    asyncio.run(all_of_them())
    assert seen == {"running", "waiting", "blocks", "held"}

    def left() -> dict[str, object]:
        stats = engine.stats()
        return {
            "tasks": live.tasks() - before,
            "running": stats.running,
            "waiting": stats.waiting,
            "blocks": stats.kv_blocks_used,
            "references": sum(entry.references for entry in served.registry.entries()),
        }

    assert not any(until_nothing(left).values()), left()
    engine.check()
    served.registry.check()

    assert engine.stats().pages_used > 0, "adapters stay on the device while they have names"
    for name in ADAPTERS:
        served.registry.delete(name)
    assert not any(until_nothing(lambda: {"pages": engine.stats().pages_used}).values()), (
        "a page is still pinned"
    )
    engine.check()


def until_nothing(look, seconds: float = 30.0) -> dict[str, object]:
    """What is left when nothing is, or when the time is over."""
    deadline = time.monotonic() + seconds
    while any((found := look()).values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
