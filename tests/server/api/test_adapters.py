"""/v1/adapters: uploads, their bounds and checks, listing and removal."""

import base64
import hashlib

import pytest

from adapters.errors import AdapterError, Finding
from tests.server import fakes
from tests.server.api.conftest import Client, error

ZIP = b"PK\x03\x04 not really"


def put(client, name, content=ZIP, **headers):
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return client("PUT", f"/v1/adapters/{name}", content=content, headers=headers)


def test_an_upload_is_served(client, world):
    response = put(client, "tax", content_type="application/zip")
    body = response.json()
    assert response.status_code == 201
    assert response.headers["etag"] == f'"{body["generation"]}"'
    assert (body["id"], body["object"], body["state"], body["rank"]) == ("tax", "adapter", "ready", 8)
    assert client.complete(adapter="tax").json()["adapter_generation"] == body["generation"]
    assert list(world.registry.store.root.iterdir()) == []


def test_the_same_again_changes_nothing(client):
    assert put(client, "tax").status_code == 201
    assert put(client, "tax").status_code == 200
    assert put(client, "tax", b"other").status_code == 201


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_too_large(tmp_path, chunked):
    client = Client(fakes.world(tmp_path, max_upload_bytes="2MiB"))

    async def chunks():
        for _ in range(30):
            yield b"x" * 100_000

    response = put(client, "tax", chunks() if chunked else b"x" * 3_000_000)
    assert (response.status_code, error(response)["code"]) == (413, "adapter_upload_too_large")
    assert response.headers["connection"] == "close"
    assert put(client, "tax", b"x" * 2 * 1024**2).status_code == 201
    assert list(tmp_path.iterdir()) == []


def test_a_digest_is_checked(client, world):
    right = base64.b64encode(hashlib.sha256(ZIP).digest()).decode()
    wrong = base64.b64encode(hashlib.sha256(b"").digest()).decode()
    assert put(client, "tax", content_digest=f"sha-512=:aaaa:, sha-256=:{right}:").status_code == 201
    for digest in (f"sha-256=:{wrong}:", "sha-256=:??:", "sha-512=:aaaa:", "nonsense"):
        response = put(client, "law", content_digest=digest)
        assert (response.status_code, error(response)["param"]) == (400, "Content-Digest")
    assert "law" not in world.registry.names


def test_if_match(client, world):
    generation = put(client, "tax").headers["etag"]
    response = put(client, "tax", b"other", if_match='"' + "0" * 64 + '"')
    assert (response.status_code, error(response)["code"]) == (412, "precondition_failed")
    assert put(client, "tax", b"other", if_match=generation).status_code == 201
    assert client("DELETE", "/v1/adapters/tax", headers={"if-match": generation}).status_code == 412
    for header in ({"if_match": "*"}, {"if_match": '"a", "b"'}, {"if_match": '""'}, {"if_none_match": "*"}):
        response = put(client, "tax", **header)
        assert (response.status_code, error(response)["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=a", "text/plain"])
def test_bodies_that_are_no_archive(client, kind):
    response = put(client, "tax", content_type=kind)
    assert (response.status_code, error(response)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("name", ["base", "-a", "a" * 65, "a%20b", "a,b", "a:b"])
def test_names_that_cannot_be(client, name):
    response = put(client, name)
    assert (response.status_code, error(response)["code"]) == (400, "invalid_adapter_name")


FORM = {"content-type": "multipart/form-data; boundary=line"}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def post(client, files, **fields):
    return client("POST", "/v1/adapters", data=fields, files=files)


def test_a_form_with_an_archive(client, world):
    response = post(client, {"file": ("tax.zip", ZIP)}, name="tax", comment="ignored")
    assert (response.status_code, response.json()["id"]) == (201, "tax")
    assert response.headers["etag"] == put(client, "same").headers["etag"], "the archive's bytes, as with PUT"
    assert post(client, {"anything": ("tax.zip", ZIP)}, name="tax").status_code == 200
    assert list(world.registry.store.root.iterdir()) == []


@pytest.mark.parametrize(
    "files",
    [
        [("file", (CONFIG, b"{}")), ("file", (TENSORS, b"tensors"))],
        [(CONFIG, ("c.json", b"{}")), (TENSORS, ("t", b"tensors"))],
        [(CONFIG, (None, b"{}")), (TENSORS, (TENSORS, b"tensors"))],
    ],
)
def test_a_form_with_the_two_files(client, world, files):
    assert post(client, files, name="tax").status_code == 201
    assert world.registry.parts == [(CONFIG, b"{}"), (TENSORS, b"tensors")]
    assert list(world.registry.store.root.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "files", "param", "code"),
    [
        ({}, {"file": ("a", ZIP)}, "name", "invalid_value"),
        ({"name": ["a", "b"]}, {"file": ("a", ZIP)}, "name", "invalid_value"),
        ({"name": "x" * 2000}, {"file": ("a", ZIP)}, "name", "invalid_value"),
        ({"name": "a,b"}, {"file": ("a", ZIP)}, None, "invalid_adapter_name"),
        ({"name": "base"}, {"file": ("a", ZIP)}, None, "invalid_adapter_name"),
        ({"name": "a"}, {"other": (None, b"no file")}, "file", "invalid_value"),
        ({"name": "a"}, [("file", (f"{i}.txt", b"")) for i in range(64)], None, "invalid_value"),
    ],
)
def test_forms_that_say_too_little_or_too_much(client, world, fields, files, param, code):
    response = post(client, files, **fields)
    found = error(response)
    assert (response.status_code, found["code"], found["param"]) == (400, code, param)
    assert sorted(world.registry.names) == ["legal", "medical"]
    assert list(world.registry.store.root.iterdir()) == []


PART = b'--line\r\nContent-Disposition: form-data; name="name"\r\n\r\ntax\r\n'


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", PART, PART + b"--line\r\n\r\nno name\r\n--line--\r\n", b"--line\r\n" + b"x" * 100_000],
)
def test_forms_that_are_none(client, world, content):
    response = client("POST", "/v1/adapters", content=content, headers=FORM)
    assert (response.status_code, error(response)["code"]) == (400, "invalid_value")
    assert "form is malformed" in error(response)["message"]
    assert list(world.registry.store.root.iterdir()) == []


def test_a_form_needs_a_boundary_and_to_be_one(client):
    response = client("POST", "/v1/adapters", content=PART, headers={"content-type": "multipart/form-data"})
    assert (response.status_code, error(response)["param"]) == (400, "Content-Type")
    for kind in ("application/json", "application/zip", "application/x-www-form-urlencoded"):
        response = client("POST", "/v1/adapters", content=b"{}", headers={"content-type": kind})
        assert (response.status_code, error(response)["code"]) == (415, "unsupported_media_type")
        assert "curl -F name=" in error(response)["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_form_too_large(tmp_path, chunked):
    client = Client(fakes.world(tmp_path, max_upload_bytes="2MiB"))
    head = PART + b'--line\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

    async def chunks():
        yield head
        for _ in range(30):
            yield b"x" * 100_000

    content = chunks() if chunked else head + b"x" * 3_000_000
    response = client("POST", "/v1/adapters", content=content, headers=FORM)
    assert (response.status_code, error(response)["code"]) == (413, "adapter_upload_too_large")
    assert response.headers["connection"] == "close"
    assert list(tmp_path.iterdir()) == []


def test_what_a_form_carries_comes_out_byte_for_byte(client, world):
    """However the bytes are cut: a boundary may come in pieces, and content may look like one."""
    data = b"\r\n--lin\r\n--line \r--\r\n" * 3
    body = PART + b"--line\r\nContent-Disposition: form-data; name=file; filename=adapter_config.json\r\n\r\n"
    body += data.replace(b"--line", b"--lime") + b"\r\n--line--\r\n"

    async def chunks(size):
        for start in range(0, len(body), size):
            yield body[start : start + size]

    for size in (1, 2, 7, 1000):
        assert client("POST", "/v1/adapters", content=chunks(size), headers=FORM).status_code in (200, 201)
        assert world.registry.parts == [(CONFIG, data.replace(b"--line", b"--lime"))]


@pytest.mark.parametrize("name", ["UTF-8''l%C3%A9gal.zip", "nonsense", "no-such''a.zip"])
def test_a_file_whose_name_is_encoded_is_a_file(client, world, name):
    head = f"--line\r\nContent-Disposition: form-data; name=file; filename*={name}\r\n\r\n"
    body = PART + head.encode() + b"x" * 5000 + b"\r\n--line--\r\n"
    response = client("POST", "/v1/adapters", content=body, headers=FORM)
    assert response.status_code == 201


def test_a_refused_archive_is_told_the_line_that_sends_one(client, world):
    world.registry.refused = AdapterError("invalid_archive", "this is no archive")
    line = "curl -T adapter.zip http://127.0.0.1:8000/v1/adapters/tax"
    for response in (put(client, "tax"), post(client, {"file": ("a", ZIP)}, name="tax")):
        assert error(response)["message"].endswith(line)
    for host, key in (("x;rm -rf", None), ("[::1]:8000", "Bearer secret")):
        headers = {"host": host} | ({"authorization": key} if key else {})
        said = error(put(client, "tax", **headers))["message"]
        assert ("HOST:PORT" in said) is (key is None)
        assert ('curl -H "Authorization: Bearer $KEY" -T' in said) is (key is not None)
        assert "secret" not in said


def test_findings_are_details(client, world):
    finding = Finding("q_proj", "rank 0", "train it again")
    world.registry.refused = AdapterError("invalid_adapter", "the adapter is invalid", (finding,))
    response = put(client, "tax")
    assert response.status_code == 400
    assert error(response)["details"] == [{"where": "q_proj", "problem": "rank 0", "cure": "train it again"}]
    world.registry.refused = AdapterError("store_full", "no room")
    response = put(client, "tax")
    assert (response.status_code, error(response)["type"]) == (507, "server_error")
    assert response.headers["x-should-retry"] == "false"
    metrics = client("GET", "/metrics").text
    assert 'loraplex_upload_total{reason="invalid_adapter",result="refused"} 1.0' in metrics


def test_listing_and_removal(client, world):
    listed = client("GET", "/v1/adapters").json()
    assert (listed["object"], [adapter["id"] for adapter in listed["data"]]) == ("list", ["legal", "medical"])
    shown = client("GET", "/v1/adapters/legal")
    assert shown.json() == listed["data"][0]
    assert shown.headers["etag"] == '"' + "1" * 64 + '"'
    response = client("DELETE", "/v1/adapters/legal")
    assert (response.status_code, response.content) == (204, b"")
    for method in ("GET", "DELETE"):
        response = client(method, "/v1/adapters/legal")
        assert (response.status_code, error(response)["code"]) == (404, "adapter_not_found")


def test_versions(client):
    body = client("GET", "/v1/adapters/legal/versions").json()
    assert body["object"] == "list"
    assert body["data"] == [
        {"revision": 3, "generation": "1" * 64, "created": 300, "current": True},
        {"revision": 1, "generation": "a" * 64, "created": 100, "current": False},
    ]
    response = client("GET", "/v1/adapters/nobody/versions")
    assert (response.status_code, error(response)["code"]) == (404, "adapter_not_found")


def roll_back(client, name="legal", headers=None, **body):
    return client("POST", f"/v1/adapters/{name}/rollback", json=body, headers=headers)


@pytest.mark.parametrize("to", [1, "a" * 64])
def test_a_rollback(client, to):
    response = roll_back(client, to=to, headers={"if-match": '"' + "1" * 64 + '"'})
    assert (response.status_code, response.json()["generation"]) == (200, "a" * 64)
    assert response.headers["etag"] == '"' + "a" * 64 + '"'
    assert client.complete(adapter="legal").json()["adapter_generation"] == "a" * 64


def test_a_rollback_that_cannot_be(client, world):
    for body in ({}, {"to": 0}, {"to": True}, {"to": None}, {"to": ""}, {"to": 1.5}):
        response = roll_back(client, **body)
        assert (response.status_code, error(response)["param"]) == (400, "to")
    for name, to in (("nobody", 1), ("legal", 2), ("legal", "b" * 64)):
        response = roll_back(client, name, to=to)
        assert (response.status_code, error(response)["code"]) == (404, "adapter_not_found")
    response = roll_back(client, to=1, headers={"if-match": '"' + "0" * 64 + '"'})
    assert (response.status_code, error(response)["code"]) == (412, "precondition_failed")
    assert world.registry.names["legal"] == "1" * 64


def test_a_rollback_to_what_does_not_fit(client, world):
    finding = Finding("q_proj", "is not here")
    world.registry.rollback = lambda *_: (_ for _ in ()).throw(
        AdapterError("adapter_incompatible", "cannot be served", (finding,))
    )
    response = roll_back(client, to=1)
    found = error(response)
    assert (response.status_code, found["code"], found["type"]) == (
        *(409, "adapter_incompatible", "conflict_error"),
    )
    assert response.headers["x-should-retry"] == "false"
    assert found["details"][0]["where"] == "q_proj"


@pytest.mark.parametrize("id", ["legal", "base:legal", "/models/base:legal"])
def test_a_model_is_removed(client, world, id):
    response = client("DELETE", f"/v1/models/{id}")
    assert (response.status_code, response.json()) == (
        *(200, {"id": "legal", "object": "model", "deleted": True}),
    )
    assert "legal" not in world.registry.names
    response = client("DELETE", f"/v1/models/{id}")
    assert (response.status_code, error(response)["code"]) == (404, "model_not_found")


def test_models_that_cannot_be_removed(client, world):
    for id, status, code in (
        *(("base", 400, "invalid_value"), ("/models/base", 400, "invalid_value")),
        *(("gpt-4", 404, "model_not_found"), ("other:legal", 404, "model_not_found")),
    ):
        response = client("DELETE", f"/v1/models/{id}")
        assert (response.status_code, error(response)["code"]) == (status, code)
    assert sorted(world.registry.names) == ["legal", "medical"]


def test_models(client, world):
    world.registry.names["odd"] = "3" * 64
    body = client("GET", "/v1/models").json()
    assert [model["id"] for model in body["data"]] == ["base", "legal", "medical"]
    assert body["object"] == "list"
    base, legal, _ = body["data"]
    assert (base["root"], base["parent"], base["max_model_len"]) == ("/models/base", None, 64)
    assert (legal["root"], legal["parent"], legal["object"]) == ("1" * 64, "base", "model")
    for id, model in (("base", base), ("/models/base", base), ("legal", legal), ("base:legal", legal)):
        assert client("GET", f"/v1/models/{id}").json() == model
    for id in ("nobody", "a/b", "base:nobody", "other:legal"):
        response = client("GET", f"/v1/models/{id}")
        assert (response.status_code, error(response)["code"]) == (404, "model_not_found")
