"""Many streams over many adapters: throughput, time to first token, time between tokens, and that every text is right.

    python -m loadtests.load                                   # 8 streams over the demo's 4 adapters
    python -m loadtests.load --streams 16 --requests 64 --seed 1

Each request's text and generation are compared with the same request run alone before. Appends one JSON line to
`loadtests/results/load.jsonl`: figures without the commit, machine, command and seed they came from say nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from loadtests.server_process import serving

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
RESULTS = ROOT / "loadtests" / "results" / "load.jsonl"
ADAPTERS = ("medical", "legal", "finance", "support")
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx_vnni": "VNNI for AVX2",
    "avx512_bf16": "bfloat16",
}  # by the flags of /proc/cpuinfo
SUBJECTS = ("discharge", "a bond", "interest", "relief", "a charge", "a claim", "a trust", "a balance")


@dataclass(frozen=True)
class Reply:
    """One streamed completion and when its pieces came, in seconds from its sending."""

    text: str
    generation: str | None
    arrivals: tuple[float, ...]
    tokens: int


def ask(client: httpx.Client, body: dict[str, Any]) -> Reply:
    """Send one streamed completion; raises `httpx.HTTPStatusError` when it is refused."""
    text, arrivals, generation, tokens = "", [], None, 0
    began = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                generation = chunk["adapter_generation"]
                if choice["text"]:
                    text += choice["text"]
                    arrivals.append(time.perf_counter() - began)
    return Reply(text, generation, tuple(arrivals), tokens)


def bodies(requests: int, max_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Requests in a fixed random order over adapters and subjects, half of them drawn rather than greedy."""
    draw = random.Random(seed)
    made = []
    for number in range(requests):
        body = {
            "model": draw.choice(ADAPTERS),
            "prompt": f"Q: What is {draw.choice(SUBJECTS)}?\nA:",
            "max_tokens": max_tokens,
            "temperature": draw.choice((0.0, 0.8)),
            "seed": number,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        made.append(body)
    return made


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{at}": round(cuts[at - 1] * 1000, 2) for at in (50, 95, 99)}


def machine() -> str:
    """The processor, how many, and its instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    named = f"{names[0] if names else platform.processor()} x{len(names) or 1}"
    return f"{named} ({', '.join(kinds)})" if (kinds := instructions()) else named


def instructions() -> list[str]:
    """Those of the processor that decide how fast it multiplies, by the names that `INSTRUCTIONS` has for them."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    return [name for flag, name in INSTRUCTIONS.items() if flag in flags]


def commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown"


def run(client: httpx.Client, options: argparse.Namespace) -> dict[str, Any]:
    """The solo runs, then all of them at once; the result line."""
    asked = bodies(options.requests, options.max_tokens, options.seed)
    solo = [ask(client, body) for body in tqdm(asked, desc="alone", disable=not sys.stderr.isatty())]
    began = time.perf_counter()
    with ThreadPoolExecutor(options.streams) as pool:
        progress = tqdm(total=len(asked), desc="together", disable=not sys.stderr.isatty())

        def one(body: dict[str, Any]) -> Reply | httpx.HTTPError:
            try:
                return ask(client, body)
            except httpx.HTTPError as error:
                return error
            finally:
                progress.update()

        together = list(pool.map(one, asked))
    seconds = time.perf_counter() - began
    good = [reply for reply in together if isinstance(reply, Reply)]
    same = sum(
        isinstance(got, Reply) and (got.text, got.generation) == (want.text, want.generation)
        for got, want in zip(together, solo, strict=True)
    )
    gaps = [b - a for reply in good for a, b in zip(reply.arrivals, reply.arrivals[1:], strict=False)]
    return {
        "name": "load",
        "commit": commit(),
        "machine": machine(),
        "command": " ".join(["python -m loadtests.load", *sys.argv[1:]]),
        "seed": options.seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "streams": options.streams,
        "requests": len(asked),
        "adapters": len(ADAPTERS),
        "errors": len(asked) - len(good),
        "equal_to_solo": same,
        "tokens_per_s": round(sum(reply.tokens for reply in good) / seconds, 1),
        "ttft_ms": percentiles([reply.arrivals[0] for reply in good]),
        "itl_ms": percentiles(gaps),
    }


def main() -> int:
    """Run against a server of its own; 1 when a request failed or a text was not that of its solo run."""
    parser = argparse.ArgumentParser(prog="loadtests.load", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    modules = [flag for name in ADAPTERS for flag in ("--lora-modules", f"{name}={DEMO}/adapters/{name}")]
    with (
        serving(DEMO / "base", "--served-model-name", "base", *modules) as server,
        httpx.Client(base_url=server.url, timeout=300) as client,
    ):
        result = run(client, options)
    with RESULTS.open("a") as lines:
        lines.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=2))
    right = result["errors"] == 0 and result["equal_to_solo"] == result["requests"]
    print(
        f"load: {'ok' if right else 'failed'}, {result['equal_to_solo']} of {result['requests']} texts as when alone"
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
