"""A stored file is damaged behind a running server's back: its adapter fails, all else goes on, a new put mends it."""

import os
from pathlib import Path

import httpx

from loadtests.archive import zipped
from loadtests.server_process import serving

DEMO = Path(__file__).parents[1] / "demo"


def test_a_stored_file_is_cut_short_before_it_is_loaded(tmp_path):
    flags = ("--served-model-name", "base", "--adapter-store", str(tmp_path / "store"), "--threads", "1")
    with serving(DEMO / "base", *flags) as server, httpx.Client(base_url=server.url, timeout=60) as client:

        def ask(name: str) -> httpx.Response:
            body = {"model": name, "prompt": "Q: What is discharge?\nA:", "max_tokens": 2, "temperature": 0}
            return client.post("/v1/completions", json=body)

        archive = zipped(DEMO / "adapters" / "legal")
        entry = client.put("/v1/adapters/legal", content=archive).json()
        file = tmp_path / "store" / "generations" / entry["generation"] / "adapter_model.safetensors"
        file.chmod(0o644)
        os.truncate(file, 4096)
        failed = ask("legal")
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "adapter_load_failed"
        assert str(tmp_path) not in failed.text
        assert ask("base").status_code == 200, "the server lives"

        again = client.put("/v1/adapters/legal", content=archive)
        assert (again.status_code, again.json()) == (200, entry)
        assert ask("legal").json()["adapter_generation"] == entry["generation"]
