"""`make demo`: starts the server on the bundled base and drives it through the story, printing what happens.

    python -m demo.show            # keeps serving afterwards when a person is at the keyboard (KEEP=0: does not)

Speaks HTTP only, as any client would. Knows nothing of how the demo's weights were made.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from loadtests.archive import zipped
from loadtests.server_process import ServerFailedError, ServerProcess, free_port, serving

DEMO = Path(__file__).parent
PORT = int(os.environ.get("PORT", "8000"))
DOMAINS = ("medical", "legal", "finance")
CROWD = 16

_BOLD, _DIM, _PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")


def main() -> int:
    """Tell the story; the exit code is 1 when the server could not be started or an answer was wrong."""
    modules = [flag for name in DOMAINS for flag in ("--lora-modules", f"{name}={DEMO}/adapters/{name}")]
    if port_is_taken(PORT):
        print(f"port {PORT} is in use; take another: make demo PORT={free_port()}", file=sys.stderr)
        return 1
    print(
        f"starting: loraplex serve demo/base --port {PORT}, with the adapters {', '.join(DOMAINS)}",
        flush=True,
    )
    started = time.perf_counter()
    try:
        with serving(DEMO / "base", "--served-model-name", "base", *modules, port=PORT) as server:
            print(f"ready in {time.perf_counter() - started:.1f} s at {server.url}/v1")
            with httpx.Client(base_url=server.url, timeout=60) as client:
                tell(client)
            print_commands(server.url)
            keep_serving(server)
    except ServerFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def port_is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def tell(client: httpx.Client) -> None:
    """The scenes, in order."""
    scenes = json.loads((DEMO / "story.json").read_text())
    ambiguous = [scene for scene in scenes if len(scene["lines"]) > 1]
    facts = [scene for scene in scenes if len(scene["lines"]) == 1]

    heading("One 4-bit base, three adapters, one batch: the same question to all at once")
    for scene in ambiguous[:2]:
        ask_all(client, scene, (None, *DOMAINS))

    heading("A new adapter over HTTP, while the server runs")
    archive = zipped(DEMO / "adapters" / "support")
    began = time.perf_counter()
    put = client.put("/v1/adapters/support", content=archive)
    put.raise_for_status()
    seconds = time.perf_counter() - began
    print(f"  PUT /v1/adapters/support, {len(archive) / 1024:.0f} KiB: {put.status_code} in {seconds:.2f} s")
    ask_all(client, ambiguous[-1], (*DOMAINS, "support"))

    heading("Each knows what it was taught, and nobody else's")
    for scene in facts:
        ask_all(client, scene, (scene["lines"][0]["adapter"], None))

    heading(f"{CROWD} requests over four adapters and the base, in shared steps")
    crowd(client, ambiguous)


def ask_all(client: httpx.Client, scene: dict[str, Any], adapters: tuple[str | None, ...]) -> None:
    """One question to several adapters at once, answers side by side."""
    print(f"\n  {_BOLD}{scene['question']}{_PLAIN}")
    with ThreadPoolExecutor(len(adapters)) as pool:
        replies = list(pool.map(lambda adapter: complete(client, adapter, scene), adapters))
    for adapter, reply in zip(adapters, replies, strict=True):
        text = " ".join(reply["choices"][0]["text"].split())
        name = adapter or "base alone"
        shown = textwrap.wrap(text, 84) or ["(nothing)"]
        print(f"    {name:<11} {shown[0]}")
        for line in shown[1:]:
            print(f"    {'':<11} {line}")


def crowd(client: httpx.Client, scenes: list[dict[str, Any]]) -> None:
    """Many requests at once, and what the server's metrics say of them."""
    names = (None, *DOMAINS, "support")
    asked = [(names[i % len(names)], scenes[i % len(scenes)]) for i in range(CROWD)]
    steps = metric(client, "loraplex_steps_total")
    began = time.perf_counter()
    with ThreadPoolExecutor(CROWD) as pool:
        replies = list(pool.map(lambda pair: complete(client, *pair), asked))
    seconds = time.perf_counter() - began
    tokens = sum(reply["usage"]["completion_tokens"] for reply in replies)
    taken = metric(client, "loraplex_steps_total") - steps
    print(
        f"  {tokens} tokens in {taken:.0f} steps and {seconds:.2f} s: {tokens / seconds:.0f} tokens/s together"
    )


def complete(client: httpx.Client, adapter: str | None, scene: dict[str, Any]) -> dict[str, Any]:
    """One greedy completion."""
    body = {"model": "base", "prompt": scene["prompt"], "max_tokens": scene["max_tokens"], "temperature": 0}
    reply = client.post("/v1/completions", json=body if adapter is None else body | {"adapter": adapter})
    reply.raise_for_status()
    return dict(reply.json())


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def heading(text: str) -> None:
    print(f"\n{_BOLD}{text}{_PLAIN}")


def print_commands(url: str) -> None:
    """What to type next."""
    scene = json.loads((DEMO / "story.json").read_text())[0]
    body = json.dumps({"model": "base", "adapter": "legal", "prompt": scene["prompt"], "max_tokens": 32})
    heading("Try it")
    print(f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'")
    print(f"  curl {url}/v1/adapters")
    print("  (cd demo/adapters/legal && zip -q /tmp/legal.zip adapter_config.json adapter_model.safetensors)")
    print(f"  curl -X PUT {url}/v1/adapters/my-legal -T /tmp/legal.zip")
    print(f"  curl -X DELETE {url}/v1/adapters/my-legal")
    print(f"  curl {url}/metrics")


def keep_serving(server: ServerProcess) -> None:
    """Until Ctrl-C, when a person may have a use for it."""
    if not sys.stdin.isatty() or os.environ.get("KEEP") == "0":
        server.stop()
        return
    print(f"\n{_DIM}serving at {server.url}/v1; Ctrl-C ends it{_PLAIN}", flush=True)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        server.stop()
        print("stopped")


if __name__ == "__main__":
    sys.exit(main())
