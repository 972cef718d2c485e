"""A full disk, at each stage of an upload, over the real store: 507, nothing changed, nothing left, still serving."""

import pytest

from adapters.files import FileOps
from adapters.store import Store
from tests.adapters.samples import adapter_files, write_zip
from tests.adapters.test_registry import Shop
from tests.adapters.test_store_failures import Failing
from tests.server import fakes
from tests.server.api.conftest import Client, error


@pytest.fixture
def shop(tmp_path):
    shop = Shop(tmp_path)
    shop.put("legal", 1)
    yield shop
    shop.registry.check()
    shop.store.close()


def serving(tmp_path, shop):
    """A client of an app whose registry and store are the shop's."""
    world = fakes.world(tmp_path / "fakes")
    object.__setattr__(world.serving.served, "registry", shop.registry)
    return Client(world)


def sends(tmp_path, shop, seed=9):
    """The two ways to upload, each with content that is new."""
    folder = shop.folder(seed)
    archive = write_zip(tmp_path / "archive", adapter_files(folder)).read_bytes()
    parts = [("file", (name, data)) for name, data in adapter_files(folder).items()]
    return {
        "put": ("PUT", "/v1/adapters/legal", {"content": archive}),
        "form": ("POST", "/v1/adapters", {"data": {"name": "legal"}, "files": {"file": ("a", archive)}}),
        "parts": ("POST", "/v1/adapters", {"data": {"name": "legal"}, "files": parts}),
    }


def assert_full(response):
    found = error(response)
    assert (response.status_code, found["code"], found["type"]) == (507, "store_full", "server_error")
    assert "disk" in found["message"]
    assert response.headers["x-should-retry"] == "false"
    assert "/" not in found["message"].replace("/v1/", ""), "no path of the server's"


@pytest.mark.parametrize("way", ["put", "form", "parts"])
def test_while_the_bytes_arrive(tmp_path, shop, monkeypatch, way):
    """A real one: /dev/full takes no byte."""
    client = serving(tmp_path, shop)
    before = client("GET", "/v1/adapters").json()
    incoming = Store.incoming

    def full(store):
        folder = incoming(store)
        for name in ("archive", *(f"part-{count}" for count in range(1, 4))):
            (folder / name).symlink_to("/dev/full")
        return folder

    method, path, options = sends(tmp_path, shop)[way]
    with monkeypatch.context() as patched:
        patched.setattr(Store, "incoming", full)
        assert_full(client(method, path, **options))
    assert client("GET", "/v1/adapters").json() == before
    assert list((shop.store.root / "incoming").iterdir()) == []
    assert client.complete(adapter="legal").status_code == 200
    assert client(method, path, **options).status_code == 201


@pytest.mark.parametrize("way", ["put", "form", "parts"])
def test_at_every_operation_of_the_store(tmp_path, shop, way):
    files = Failing()
    shop.reopen(files=files)
    client = serving(tmp_path, shop)
    before = client("GET", "/v1/adapters").json()
    method, path, options = sends(tmp_path, shop)[way]
    refused = 0
    for place in range(100):
        files.calls.clear()
        files.fail_at = place
        response = client(method, path, **options)
        failed, files.fail_at = len(files.calls) > place, None
        if response.status_code == 201:
            break  # only a clean-up failed, or nothing any more
        refused += 1
        assert failed
        assert_full(response)
        assert client("GET", "/v1/adapters").json() == before
        assert client.complete(adapter="legal").status_code == 200
    else:
        pytest.fail("an upload never came through")
    assert refused >= 6, "incoming, two writes, two syncs, and the moves"
    shop.reopen(files=FileOps())
    assert list((shop.store.root / "incoming").iterdir()) == []
