"""The whole product, over HTTP: a real server on the demo's base, many streams at once, each held to its solo run."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from kernels.cpu.library import load
from loadtests.server_process import serving

DEMO = Path(__file__).parents[1] / "demo"
ADAPTERS = ("medical", "legal", "finance", "support")
PROMPTS = ("Q: What is discharge?\nA:", "Q: What is a bond?\nA:")


@pytest.fixture(scope="module")
def server():
    modules = [flag for name in ADAPTERS for flag in ("--lora-modules", f"{name}={DEMO}/adapters/{name}")]
    with serving(DEMO / "base", "--served-model-name", "base", *modules) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def what_it_said(server) -> list[str]:
    """The lines of its start, which are printed just after it answers."""
    until = time.monotonic() + 20
    while "\nready in " not in server.log.read_text():
        assert time.monotonic() < until, server.log.read_text()
        time.sleep(0.1)
    return server.log.read_text().splitlines()


def test_a_start_says_which_kernels_run(server):
    best = load()
    want = "plain PyTorch" if best is None else f"{best.instruction_set}, fp32"
    assert f"kernels     {want}" in what_it_said(server)


def test_a_start_warns_of_nothing(server):
    """Least of all in a library's words, about what a server does not use."""
    assert not [line for line in what_it_said(server) if "warning" in line.lower()]


def streamed(
    client: httpx.Client, body: dict, started: threading.Barrier | None = None
) -> tuple[str, str, str | None]:
    """The text, the adapter and its generation; every chunk must name the same ones."""
    if started is not None:
        started.wait()
    text, named = "", set()
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        header = reply.headers.get("x-adapter-generation")
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                text += chunk["choices"][0]["text"]
                named.add((chunk["model"], chunk["adapter_generation"]))
    ((model, generation),) = named
    assert header == generation
    return text, model, generation


def bodies() -> list[dict]:
    """Eight requests over four adapters and the base, greedy and drawn."""
    greedy = {"model": "base", "max_tokens": 40, "temperature": 0}
    drawn = {"model": "base", "max_tokens": 40, "temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 11}
    asked = [greedy | {"adapter": name, "prompt": PROMPTS[0]} for name in ADAPTERS]
    asked += [drawn | {"adapter": name, "prompt": PROMPTS[1]} for name in ADAPTERS[:2]]
    return [*asked, greedy | {"prompt": PROMPTS[0]}, drawn | {"prompt": PROMPTS[1], "adapter": "support"}]


def test_eight_streams_at_once_equal_their_solo_runs(client):
    asked = bodies()
    solo = [streamed(client, body) for body in asked]
    barrier = threading.Barrier(len(asked))
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda body: streamed(client, body, barrier), asked))
    assert together == solo
    assert len({text for text, _, _ in solo}) == len(asked), "different adapters and draws must be told apart"
    assert {model for _, model, _ in solo} == {"base", *ADAPTERS}


def test_they_did_share_steps(client):
    """The test above is about nothing if the server ran one sequence after the other."""

    def counters() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("loraplex_")]
        return {name: float(value) for name, value in pairs}

    before = counters()
    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda body: streamed(client, body, barrier), bodies()))
    after = counters()
    steps = after["loraplex_steps_total"] - before["loraplex_steps_total"]
    tokens = after["loraplex_generated_tokens_total"] - before["loraplex_generated_tokens_total"]
    assert tokens > 3 * steps


def test_the_selectors_agree(client):
    body = {"prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0}
    ways = [{"model": "base", "adapter": "legal"}, {"model": "legal"}, {"model": "base:legal"}]
    replies = [client.post("/v1/completions", json=body | way).json() for way in ways]
    assert len({reply["choices"][0]["text"] for reply in replies}) == 1
    assert {reply["model"] for reply in replies} == {"legal"}
    conflict = client.post("/v1/completions", json=body | {"model": "legal", "adapter": "finance"})
    assert conflict.status_code == 400
    assert (
        client.post("/v1/completions", json=body | {"model": "legal", "adapter": "legal"}).status_code == 200
    )
