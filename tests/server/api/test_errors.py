"""Every failure is an envelope with its status, its headers, and nothing that is the server's own."""

import gzip

import pytest

from adapters.errors import AdapterError
from server.api.generation import Echo
from server.api.validation import first_error
from server.errors import ADAPTER_STATUS, AdapterRejectedError
from server.text.tokenizer import Tokenizer
from tests.server.api.conftest import Client, error, events

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "content", ["{", "", "[1]", "5", '{"prompt": "\\ud800"}', b"\xff\xfe", "[" * 10_000, "null"]
)
def test_a_body_that_is_no_object(client, content):
    response = client("POST", "/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert error(response)["type"] == "invalid_request_error"
    assert len(response.content) < 500


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
)
def test_a_body_of_another_kind(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    response = client("POST", "/v1/completions", content='{"prompt": "a"}', headers=headers)
    assert (response.status_code, error(response)["code"]) == (415, "unsupported_media_type")


def test_a_packed_body_is_told_from_a_wrong_one(client):
    packed = gzip.compress(b'{"prompt": "a"}')
    response = client("POST", "/v1/completions", content=packed, headers={**JSON, "content-encoding": "GZip"})
    assert (response.status_code, error(response)["code"]) == (415, "unsupported_media_type")
    assert error(response)["param"] == "Content-Encoding"
    plain = {**JSON, "content-encoding": "identity"}
    assert client("POST", "/v1/completions", content='{"prompt": "a"}', headers=plain).status_code == 200


def test_json_by_other_names_is_json(client):
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        response = client(
            "POST", "/v1/completions", content='{"prompt": "a"}', headers={"content-type": kind}
        )
        assert response.status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large(client, chunked):
    async def chunks():
        for _ in range(50):
            yield b" " * 100_000

    content = chunks() if chunked else b" " * 5_000_000
    response = client("POST", "/v1/completions", content=content, headers=JSON)
    assert (response.status_code, error(response)["code"]) == (413, "request_too_large")


def test_what_was_sent_is_not_echoed_at_length(client):
    for body in (
        {"prompt": {"a": "x" * 100_000}},
        {"prompt": "a", "stop": "x" * 100_000},
        {"prompt": "a", "model": "x" * 9000},
    ):
        response = client("POST", "/v1/completions", json=body)
        assert response.status_code in (400, 404)
        assert len(response.content) < 3000


def test_routes_and_methods_that_are_not(client):
    response = client("GET", "/v1/nothing")
    assert (response.status_code, error(response)["code"]) == (404, "not_found")
    for path in ("/chat/completions", "/v1/v1/chat/completions", "/v1/responses"):
        message = error(client("POST", path, json={}))["message"]
        assert message.startswith(f"no route POST {path}; ")
        assert "/v1/chat/completions" in message.removeprefix(f"no route POST {path}")
    response = client("GET", "/v1/completions")
    assert (response.status_code, error(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_full_queue(client, world, stream, n):
    world.engine.max_open = n - 1
    response = client.complete(stream=stream, n=n, adapter="legal")
    assert (response.status_code, error(response)["code"]) == (429, "queue_full")
    assert error(response)["type"] == "rate_limit_error"
    assert 0 < int(response.headers["retry-after"]) <= 120


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_bug_shows_neither_path_nor_trace(client, world, stream, n, caplog):
    world.engine.fail_after = 0
    response = client.complete(stream=stream, n=n, adapter="legal")
    assert response.status_code == 500
    assert error(response)["type"] == "server_error"
    assert "secret" not in response.text
    assert "/secret/path exploded" in caplog.text


def test_an_error_after_the_first_token_is_an_event(client, world):
    world.engine.fail_after = 2
    for n in (1, 2):
        response = client.complete(stream=True, n=n, adapter="legal", stream_options={"include_usage": True})
        assert response.status_code == 200
        *chunks, last = events(response)
        assert chunks
        assert set(last) == {"error"}
        assert last["error"]["code"] == "server_error"
        assert "secret" not in response.text


def test_an_adapters_failure_keeps_its_code(client, world):
    world.engine.fail_after = 0
    world.engine.error = AdapterRejectedError(AdapterError("adapter_load_failed", "cannot be read back"))
    response = client.complete(adapter="legal")
    found = error(response)
    assert (response.status_code, found["code"], found["type"]) == (
        500,
        "adapter_load_failed",
        "server_error",
    )


@pytest.mark.parametrize(("code", "status"), ADAPTER_STATUS.items())
def test_an_adapters_error_says_by_itself_whose_mistake_it_is(code, status):
    rejected = AdapterRejectedError(AdapterError(code, "no"))
    kind = {409: "conflict_error", 500: "server_error", 507: "server_error"}.get(
        status, "invalid_request_error"
    )
    assert (rejected.code, rejected.http_status, rejected.type) == (code, status, kind)


@pytest.mark.parametrize(
    ("phase", "code"), [("loading", "not_ready"), ("draining", "not_ready"), ("failed", "engine_dead")]
)
def test_not_ready(client, world, phase, code):
    world.serving.phase = phase
    calls = [
        ("POST", "/v1/completions", {"json": {"prompt": "a"}}),
        ("POST", "/v1/chat/completions", {"json": {"messages": [{"role": "user", "content": "a"}]}}),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/adapters", {}),
        ("PUT", "/v1/adapters/new", {"content": b"zip"}),
        ("DELETE", "/v1/adapters/legal", {}),
    ]
    for response in client.together(calls):
        assert (response.status_code, error(response)["code"]) == (503, code)
        assert 0 < int(response.headers["retry-after"]) <= 120


def test_the_request_id_is_echoed_if_it_is_plain(client):
    for given, kept in (
        ("a.B-c_1:2", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("é", False),
    ):
        response = client("GET", "/health", headers={"x-request-id": given.encode()})
        assert (response.headers["x-request-id"] == given) is kept
    assert client("GET", "/nothing", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_errors_before_the_engine_release_the_adapter(client, world):
    for body in (
        {"prompt": [1] * 100},
        {"prompt": [10**6]},
        {"stop_token_ids": [-1]},
        {"prompt": [[3]] * 300},
    ):
        assert client.complete(adapter="legal", **body).status_code == 400
    assert world.registry.resolved == 4


def test_what_is_too_much_is_refused_before_any_work_on_it(client, monkeypatch):
    def work(*_):
        raise AssertionError("work was done")

    monkeypatch.setattr(Echo, "of", work)
    overlong = client.complete(prompt="a b c " * 100, echo=True)
    assert (overlong.status_code, error(overlong)["code"]) == (400, "context_length_exceeded")
    monkeypatch.setattr(Tokenizer, "encode", work)
    for body in ({"prompt": [""] * 257}, {"prompt": ["a"] * 17, "n": 16}, {"prompt": ["a"] * 5000}):
        refused = client.complete(**body)
        assert (refused.status_code, error(refused)["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/chat/completions", "messages", [1] * 100_000),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": ""}] * 5000),
        (
            "/v1/chat/completions",
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}],
        ),
        ("/tokenize", "messages", [{"role": "user", "content": ""}] * 5000),
        ("/v1/completions", "stop_token_ids", ["a"] * 100_000),
        ("/v1/completions", "stop_token_ids", [1] * 257),
        ("/detokenize", "tokens", ["a"] * 100_000),
    ],
)
def test_a_list_is_checked_up_to_its_first_mistake(client, monkeypatch, path, field, value):
    found = []
    monkeypatch.setattr(
        "server.api.asgi.first_error", lambda errors: found.append(errors) or first_error(errors)
    )
    response = client("POST", path, json={"prompt": None if path == "/tokenize" else "a", field: value})
    assert (response.status_code, error(response)["param"].split(".")[0]) == (400, field)
    ((_,),) = found


def test_two_apps_share_nothing(client, world):
    other = Client(world)
    client.complete()
    assert 'adapter="(base)"' in client("GET", "/metrics").text
    assert 'adapter="(base)"' not in other("GET", "/metrics").text
