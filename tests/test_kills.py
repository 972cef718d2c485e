"""The whole server killed while it takes uploads: after a restart every name answers, nothing acknowledged is lost."""

import random
import threading
import time
from pathlib import Path

import httpx

from loadtests.archive import zipped
from loadtests.server_process import serving
from tests.test_hot_swap import revision

DEMO = Path(__file__).parents[1] / "demo"
KILLS = 4


class Uploader(threading.Thread):
    """Puts one new content after the other under one name until the server is gone."""

    def __init__(self, url: str, folder: Path, first: int) -> None:
        super().__init__()
        self.url, self.folder, self.number = url, folder, first
        self.acknowledged: tuple[int, str] = (0, "")  # revision and generation of the last
        self.some = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30) as client:
            try:
                while True:
                    archive = zipped(revision(self.folder, self.number))
                    self.number += 1
                    reply = client.put("/v1/adapters/moving", content=archive)
                    assert reply.status_code == 201, reply.text
                    self.acknowledged = (reply.json()["revision"], reply.json()["generation"])
                    self.some.set()
            except httpx.TransportError:
                return


def test_the_server_is_killed_while_it_takes_uploads(tmp_path):
    moments = random.Random(5)
    flags = ("--served-model-name", "base", "--adapter-store", str(tmp_path / "store"), "--threads", "1")
    number, promised = 0, (0, "")
    for _ in range(KILLS):
        with (
            serving(DEMO / "base", *flags) as server,
            httpx.Client(base_url=server.url, timeout=60) as client,
        ):
            if promised[0]:
                assert_answers(client, promised)
            uploader = Uploader(server.url, tmp_path / "upload", number)
            uploader.start()
            assert uploader.some.wait(60)
            time.sleep(moments.uniform(0.05, 0.6))
            server.process.kill()
            uploader.join(60)
            number, promised = uploader.number, uploader.acknowledged
    with serving(DEMO / "base", *flags) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert_answers(client, promised)


def assert_answers(client: httpx.Client, promised: tuple[int, str]) -> None:
    """The name serves the last acknowledged content, or the one that was on its way when the server died."""
    entry = client.get("/v1/adapters/moving").json()
    assert entry["state"] == "ready"
    revision, generation = promised
    assert entry["revision"] in (revision, revision + 1)
    assert (entry["revision"] == revision) == (entry["generation"] == generation)
    body = {"model": "moving", "prompt": "Q: What is discharge?\nA:", "max_tokens": 4, "temperature": 0}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["adapter_generation"] == entry["generation"]
