"""A name takes a new generation while requests run: each ends with what it began with, and nothing is left over."""

import asyncio
import gc
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from loadtests.archive import zipped
from loadtests.server_process import serving
from server.config import Settings
from server.config_values import MIB
from server.engine.sequence import Sampling, Submit, Token
from server.serving import Serving
from server.startup import load

DEMO = Path(__file__).parents[1] / "demo"
STREAMS, BEFORE, LENGTH = 8, 8, 160
QUESTIONS = ("discharge", "a bond", "interest", "relief", "a charge", "a claim", "a trust", "a balance")
BODY = {
    "model": "swapped",
    "max_tokens": LENGTH,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"continuous_usage_stats": True},
}


class Stream:
    """One streamed completion: its text, the generation it names, and how many tokens have come."""

    def __init__(self, client: httpx.Client, question: str) -> None:
        self.client = client
        self.body = BODY | {"prompt": f"Q: What is {question}?\nA:"}
        self.text, self.generations, self.tokens = "", set(), 0
        self.under_way = threading.Event()

    def read(self) -> "Stream":
        with self.client.stream("POST", "/v1/completions", json=self.body) as reply:
            assert reply.status_code == 200, reply.read()
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    self.text += chunk["choices"][0]["text"]
                    self.generations.add(chunk["adapter_generation"])
                    self.tokens = chunk["usage"]["completion_tokens"]
                    if self.tokens >= BEFORE:
                        self.under_way.set()
        assert self.tokens == LENGTH
        return self


def solo(client: httpx.Client) -> list[Stream]:
    return [Stream(client, question).read() for question in QUESTIONS]


def put(client: httpx.Client, name: str) -> None:
    client.put("/v1/adapters/swapped", content=zipped(DEMO / "adapters" / name)).raise_for_status()


def test_eight_streams_end_with_the_generation_they_began_with():
    with (
        serving(DEMO / "base", "--served-model-name", "base") as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        put(client, "finance")
        new = solo(client)
        put(client, "legal")
        old = solo(client)
        assert all(a.text != b.text for a, b in zip(old, new, strict=True)), "old and new must be told apart"

        running = [Stream(client, question) for question in QUESTIONS]
        with ThreadPoolExecutor(STREAMS) as pool:
            ends = [pool.submit(stream.read) for stream in running]
            for stream in running:
                assert stream.under_way.wait(60)
            put(client, "finance")
            at_swap = [stream.tokens for stream in running]
            for end in ends:
                end.result()
        later = solo(client)

    assert all(BEFORE <= tokens <= LENGTH - 8 for tokens in at_swap), "the swap was not in mid-stream"
    assert [stream.text for stream in running] == [stream.text for stream in old]
    assert [stream.generations for stream in running] == [stream.generations for stream in old]
    assert [stream.text for stream in later] == [stream.text for stream in new]
    assert [stream.generations for stream in later] == [stream.generations for stream in new]


@pytest.fixture
def served(tmp_path):
    settings = Settings(
        model=str(DEMO / "base"),
        adapter_store=tmp_path / "store",
        quantized_cache=tmp_path / "quantized",
        device="cpu",
        threads=1,
        adapter_memory_bytes=64 * MIB,
        adapter_host_memory_bytes=16 * MIB,
        kv_cache_memory_bytes=32 * MIB,
    )
    serving = Serving()
    load(settings, serving)
    yield serving.served
    serving.served.engine.stop()
    serving.served.loader.close()
    serving.served.registry.store.close()


def revision(folder: Path, number: int) -> Path:
    """The demo's legal or finance adapter by turns, with a config of its own: a content that was never there before."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DEMO / "adapters" / ("legal", "finance")[number % 2], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"revision": f"r{number}"}))
    return folder


def check(served) -> None:
    served.engine.check()
    served.registry.check()


def test_two_hundred_swaps_leave_nothing_behind(served, tmp_path):
    prompt = served.tokenizer.encode("Q: What is discharge?\nA:")
    process = psutil.Process()

    async def ask(number: int) -> list[int]:
        with served.registry.resolve("swapped") as reference:
            submit = Submit(f"ask-{number}", prompt, Sampling(6, temperature=0), reference.generation)
            return [
                event.token_id async for event in served.engine.stream(submit) if isinstance(event, Token)
            ]

    def level() -> tuple[int, int, int]:
        gc.collect()
        disk = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file())
        return process.memory_info().rss, process.num_fds(), disk

    texts, at_50 = set(), (0, 0, 0)
    for number in range(200):
        put = served.registry.put_folder("swapped", revision(tmp_path / "upload", number))
        assert put.created
        texts.add((number % 2, tuple(asyncio.run(ask(number)))))
        if number % 10 == 0:
            check(served)
        if number == 49:
            at_50 = level()
    assert len(texts) == 2, "each of the two contents has one text, every time"
    check(served)
    rss, descriptors, disk = level()
    assert rss <= 1.05 * at_50[0]
    assert descriptors <= at_50[1]
    assert disk <= 1.05 * at_50[2]
    assert served.engine.stats().pages_used <= served.engine.stats().pages_total
    served.registry.delete("swapped")
    asyncio.run(_quiet(served))
    assert served.engine.stats().resident == ()
    assert served.loader.nbytes == 0
    check(served)


def test_a_name_that_moved_reads_nothing_of_what_it_was(served):
    """KV blocks are kept by generation: by name, the new content would read the old one's keys and values."""
    prompt = served.tokenizer.encode("Q: What is discharge?\nA:" * 6)

    def ask(**given):
        async def tokens():
            with served.registry.resolve("swapped") as reference:
                sampling = Sampling(4, temperature=1.0, seed=3, repetition_penalty=1.2, logprobs=5, **given)
                submit = Submit("ask", prompt, sampling, reference.generation)
                events = [event async for event in served.engine.stream(submit)]
            return [(event.token_id, event.logprobs) for event in events if isinstance(event, Token)]

        return asyncio.run(tokens())

    told = {}
    for name in ("finance", "legal", "finance"):
        served.registry.put_folder("swapped", DEMO / "adapters" / name)
        computed = ask(prompt_logprobs=0)  # takes up no blocks
        before = served.engine.stats().prefix_hits
        assert ask() == computed
        assert served.engine.stats().prefix_hits > before
        told.setdefault(name, computed)
        assert told[name] == computed
    assert told["finance"] != told["legal"]
    for name in ("finance", "legal"):
        served.registry.put_folder("swapped", DEMO / "adapters" / name)
        assert ask() == told[name]


async def _quiet(served) -> None:
    """Until the engine has carried out what is in its inbox."""
    for _ in range(200):
        if not served.engine.stats().resident:
            return
        await asyncio.sleep(0.02)
