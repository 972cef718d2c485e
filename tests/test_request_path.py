"""A request crosses 25 files of ours or fewer, and ARCHITECTURE.md names them: a warm streamed completion is traced."""

import asyncio
import re
import sys
import threading
from pathlib import Path

import httpx
import pytest

from server.api.app import create_app
from server.config import Settings
from server.serving import Serving
from server.startup import load

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
MOST = 25
BODY = {
    "model": "base",
    "adapter": "legal",
    "prompt": "Q: What is discharge?\nA:",
    "max_tokens": 4,
    "stream": True,
}


@pytest.fixture
def traced():
    """Files of ours with a function that ran while `watching` was set, in any thread started meanwhile."""
    crossed: set[str] = set()
    watching = threading.Event()

    def note(frame, event, _argument):
        if event == "call" and watching.is_set() and frame.f_code.co_name != "<module>":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                crossed.add(str(path.relative_to(ROOT)))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield crossed, watching
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def named_in_architecture() -> set[str]:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    (listed,) = re.findall(r"<!-- path -->(.*?)<!-- end of path -->", page, re.DOTALL)
    return set(re.findall(r"`([\w/]+\.py)`", listed))


def test_the_path_of_a_request(traced, tmp_path):
    crossed, watching = traced
    settings = Settings(
        model=str(DEMO / "base"),
        served_model_name="base",
        adapter_store=tmp_path / "store",
        quantized_cache=tmp_path / "quantized",
        lora_modules=[f"legal={DEMO}/adapters/legal"],
        device="cpu",
    )
    serving = Serving()
    load(settings, serving)
    served = serving.served
    transport = httpx.ASGITransport(app=create_app(settings, serving))

    async def twice() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
            watching.set()
            reply = await client.post("/v1/completions", json=BODY)
            watching.clear()
            assert reply.status_code == 200
            assert reply.text.endswith("data: [DONE]\n\n")

    try:
        asyncio.run(twice())
    finally:
        served.engine.stop()
        served.loader.close()
        served.registry.store.close()
    ours = {path for path in crossed if path.split("/")[0] in ("adapters", "kernels", "server")}
    assert ours == named_in_architecture()
    assert len(ours) <= MOST
