"""Is the product there at all? A server, three adapters at once, an upload, a refused upload, metrics, SIGTERM.

    python -m loadtests.smoke [--device cuda] [any other flag of the server ...]

Ends with a line `smoke: ok ...`, or with the first thing that was wrong and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from loadtests.archive import zipped
from loadtests.server_process import ServerFailedError, serving

DEMO = Path(__file__).parent.parent / "demo"
DOMAINS = ("medical", "legal", "finance")


class SmokeError(Exception):
    """Something was not as it has to be."""


def expect(right: bool, what: str) -> None:
    if not right:
        raise SmokeError(what)


def complete(client: httpx.Client, adapter: str | None, scene: dict[str, Any]) -> dict[str, Any]:
    """One greedy completion of a scene's prompt."""
    body = {"model": "base", "prompt": scene["prompt"], "max_tokens": scene["max_tokens"], "temperature": 0}
    reply = client.post("/v1/completions", json=body if adapter is None else body | {"adapter": adapter})
    expect(reply.status_code == 200, f"{adapter}: status {reply.status_code}: {reply.text}")
    return dict(reply.json())


def check_answer(reply: dict[str, Any], line: dict[str, str]) -> None:
    text = reply["choices"][0]["text"]
    expect(
        line["must_contain"] in text, f"{line['adapter']} answered {text!r}, without {line['must_contain']!r}"
    )
    expect(reply["model"] == reply["adapter"] == line["adapter"], f"the reply names {reply['model']}")
    expect(len(reply["adapter_generation"]) == 64, "the reply does not name its generation")


def three_adapters_at_once(client: httpx.Client, scene: dict[str, Any]) -> None:
    lines = [line for line in scene["lines"] if line["adapter"] in DOMAINS]
    with ThreadPoolExecutor(len(lines)) as pool:
        replies = list(pool.map(lambda line: complete(client, line["adapter"], scene), lines))
    for reply, line in zip(replies, lines, strict=True):
        check_answer(reply, line)


def upload(client: httpx.Client, scene: dict[str, Any]) -> None:
    before = client.post("/v1/completions", json={"model": "base", "adapter": "support", "prompt": "x"})
    expect(before.status_code == 404, f"an unknown adapter gave {before.status_code}, not 404")
    put = client.put("/v1/adapters/support", content=zipped(DEMO / "adapters" / "support"))
    expect(put.status_code == 201, f"the upload gave {put.status_code}: {put.text}")
    line = next(line for line in scene["lines"] if line["adapter"] == "support")
    check_answer(complete(client, "support", scene), line)


def refused_upload(client: httpx.Client) -> None:
    archive = zipped(DEMO / "adapters" / "legal")
    put = client.put("/v1/adapters/legal", content=archive[: len(archive) // 2])
    expect(put.status_code == 400, f"a truncated archive gave {put.status_code}, not 400")
    expect(put.json()["error"]["code"] == "invalid_archive", f"a truncated archive gave {put.text}")
    expect(client.get("/v1/adapters/legal").status_code == 200, "a refused upload took the adapter away")


def metrics(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    for line in (
        'loraplex_adapters{state="registered"} 4.0',
        'loraplex_adapter_requests_total{adapter="medical"',
    ):
        expect(line in text, f"/metrics does not say {line}")


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; 0 when all is well."""
    parser = argparse.ArgumentParser(prog="loadtests.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    options, flags = parser.parse_known_args(arguments)
    started = time.perf_counter()
    modules = [flag for name in DOMAINS for flag in ("--lora-modules", f"{name}={DEMO}/adapters/{name}")]
    scene = json.loads((DEMO / "story.json").read_text())[0]
    try:
        with (
            serving(
                DEMO / "base", "--served-model-name", "base", "--device", options.device, *flags, *modules
            ) as server,
            httpx.Client(base_url=server.url, timeout=60) as client,
        ):
            three_adapters_at_once(client, scene)
            upload(client, scene)
            refused_upload(client)
            metrics(client)
            code = server.stop()
            expect(code == 0, f"SIGTERM ended the server with exit code {code}")
    except (SmokeError, ServerFailedError, httpx.HTTPError) as error:
        print(f"smoke: failed: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    print(f"smoke: ok, 3 adapters at once, 1 upload, 1 refused upload, clean SIGTERM, in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
