"""Keys: what they open, what is open without, and that none is ever repeated."""

import logging

import pytest

from server.api.auth import OPEN, is_loopback
from server.config import Settings
from tests.server import fakes
from tests.server.api.conftest import Client, error

ASKED, ADMIN = "sk-asks-12345", "sk-admin-67890"
CHANGES = [
    ("PUT", "/v1/adapters/tax", {"content": b"PK\x03\x04"}),
    ("POST", "/v1/adapters", {"data": {"name": "tax"}, "files": {"file": ("a", b"PK\x03\x04")}}),
    ("POST", "/v1/adapters/legal/rollback", {"json": {"to": 1}}),
    ("DELETE", "/v1/adapters/legal", {}),
    ("DELETE", "/v1/models/medical", {}),
]
ASKS = [
    ("POST", "/v1/completions", {"json": {"prompt": "the patient", "max_tokens": 1}}),
    ("POST", "/v1/chat/completions", {"json": {"messages": [{"role": "user", "content": "a"}]}}),
    ("POST", "/tokenize", {"json": {"prompt": "a"}}),
    ("POST", "/detokenize", {"json": {"tokens": [3]}}),
    ("GET", "/v1/models", {}),
    ("GET", "/v1/models/legal", {}),
    ("GET", "/v1/adapters", {}),
    ("GET", "/v1/adapters/legal", {}),
    ("GET", "/v1/adapters/legal/versions", {}),
    ("GET", "/docs", {}),
    ("GET", "/redoc", {}),
    ("GET", "/openapi.json", {}),
]


@pytest.fixture
def server(tmp_path):
    def make(**settings):
        return Client(fakes.world(tmp_path, **settings))

    return make


def bearer(key):
    return {} if key is None else {"authorization": f"Bearer {key}"}


def statuses(client, calls, key, **headers):
    answers = [
        client(method, path, **options, headers=bearer(key) | headers) for method, path, options in calls
    ]
    return {answer.status_code for answer in answers}


OPENS = {200, 201, 204}


@pytest.mark.parametrize(
    ("settings", "key", "asks", "changes"),
    [
        ({}, None, OPENS, OPENS),
        ({"host": "0.0.0.0"}, None, OPENS, {403}),
        ({"api_key": [ASKED]}, None, {401}, {401}),
        ({"api_key": [ASKED]}, "wrong", {401}, {401}),
        ({"api_key": [ASKED]}, ASKED, OPENS, OPENS),
        ({"api_key": [ASKED], "host": "::"}, ASKED, OPENS, {403}),
        ({"admin_api_key": [ADMIN]}, None, OPENS, {401}),
        ({"admin_api_key": [ADMIN]}, "wrong", OPENS, {401}),
        ({"admin_api_key": [ADMIN], "host": "0.0.0.0"}, ADMIN, OPENS, OPENS),
        ({"api_key": [ASKED], "admin_api_key": [ADMIN]}, None, {401}, {401}),
        ({"api_key": [ASKED], "admin_api_key": [ADMIN]}, "wrong", {401}, {401}),
        ({"api_key": [ASKED], "admin_api_key": [ADMIN]}, ASKED, OPENS, {403}),
        ({"api_key": [ASKED], "admin_api_key": [ADMIN], "host": "0.0.0.0"}, ADMIN, OPENS, OPENS),
    ],
)
def test_who_may_do_what(server, settings, key, asks, changes):
    client = server(**settings)
    assert statuses(client, ASKS, key) <= asks
    before = dict(client.world.registry.names)
    assert statuses(client, CHANGES, key) <= changes
    assert (client.world.registry.names == before) is (changes != OPENS)


def test_the_lists_above_are_all_the_routes(client):
    paths = client.app.openapi()["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    named = {("GET", "/v1/adapters/{name}"), ("GET", "/v1/adapters/{name}/versions")}
    named |= {("PUT", "/v1/adapters/{name}"), ("DELETE", "/v1/adapters/{name}")}
    named |= {("POST", "/v1/adapters/{name}/rollback")}
    named |= {(method, "/v1/models/{id}") for method in ("GET", "DELETE")}
    named |= {(method, path) for method, path, _ in (*ASKS, *CHANGES)}
    assert {route for route in routes if route[1] not in OPEN} <= named
    assert {path for _, path in routes} >= OPEN


def test_supervisors_need_no_key(server):
    client = server(api_key=[ASKED])
    for path in OPEN:
        assert client("GET", path).status_code == 200
        assert client("GET", path + "/").status_code == 401
    for path in ("/health", "/ready"):
        assert client("HEAD", path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/nothing"), ("HEAD", "/v1/models"), ("OPTIONS", "/v1/completions"), ("PATCH", "/")],
)
def test_what_is_no_route_needs_a_key_too(server, method, path):
    client = server(api_key=[ASKED])
    response = client(method, path)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert response.headers["x-request-id"]
    answered = client(method, path, headers=bearer(ASKED))
    assert answered.status_code in (404, 405)
    if method != "HEAD":  # an answer to HEAD has no body
        assert error(response)["code"] == "invalid_api_key"
        assert error(answered)["code"] in ("not_found", "method_not_allowed")


@pytest.mark.parametrize(
    ("header", "opens"),
    [
        (f"Bearer {ASKED}", True),
        (f"bearer {ASKED}", True),
        (f"Bearer   {ASKED} ", True),
        (f"Bearer {ADMIN}", True),
        ("Bearer second", True),
        (ASKED, False),
        (f"Basic {ASKED}", False),
        (f"Bearer {ASKED[:-1]}", False),
        (f"Bearer {ASKED}x", False),
        (f"Bearer {ASKED},second", False),
        ("Bearer ", False),
        ("Bearer é".encode(), False),
        (b"Bearer \xff", False),
        ("", False),
    ],
)
def test_spellings_of_a_key(server, header, opens):
    client = server(api_key=[ASKED, "second"], admin_api_key=[ADMIN])
    response = client("GET", "/v1/models", headers={"authorization": header})
    assert response.status_code == (200 if opens else 401)


def test_every_key_is_compared_in_constant_time(server, monkeypatch):
    import hmac

    compared = []

    def compare(one, other):
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr("server.api.auth.hmac", type("hmac", (), {"compare_digest": staticmethod(compare)}))
    client = server(api_key=["a", "b", "c"], admin_api_key=["d", "e"])
    for key in ("a", "c", "e", "nobody's"):
        compared.clear()
        client("GET", "/v1/models", headers=bearer(key))
        assert compared == [(32, 32)] * 5


def test_a_key_is_asked_for_before_the_body_is_read(server):
    client = server(api_key=[ASKED], admin_api_key=[ADMIN])
    sent = []

    async def chunks():
        sent.append(1)
        yield b"x"

    for key, status in ((None, 401), (ASKED, 403)):
        response = client("PUT", "/v1/adapters/tax", content=chunks(), headers=bearer(key))
        assert response.status_code == status
    assert sent == []


def test_no_scope_is_an_error_of_its_own(server):
    client = server(api_key=[ASKED], admin_api_key=[ADMIN])
    response = client("DELETE", "/v1/adapters/legal", headers=bearer(ASKED))
    found = error(response)
    assert (response.status_code, found["code"], found["type"]) == (
        *(403, "insufficient_scope", "permission_error"),
    )
    closed = error(server(host="0.0.0.0")("DELETE", "/v1/adapters/legal"))
    assert "--admin-api-key" in closed["message"]


@pytest.mark.parametrize(
    ("origin", "opens"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:3000", True),
        ("http://[::1]", True),
        ("https://evil.example", False),
        ("http://127.0.0.1.evil.example", False),
        ("null", False),
        ("http://[", False),
    ],
)
def test_a_page_of_another_site_changes_nothing(server, origin, opens):
    client = server()
    response = client("DELETE", "/v1/adapters/legal", headers={"origin": origin})
    assert response.status_code == (204 if opens else 403)
    keyed = server(admin_api_key=[ADMIN])
    headers = bearer(ADMIN) | {"origin": "https://console.example"}
    assert keyed("DELETE", "/v1/adapters/legal", headers=headers).status_code == 204
    for answer in (client("OPTIONS", "/v1/completions", headers={"origin": origin}), response):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_keys_are_repeated_nowhere(server, caplog):
    caplog.set_level(logging.DEBUG)
    client = server(api_key=[ASKED], admin_api_key=[ADMIN])
    said = [repr(client.world.settings), str(client.world.settings), client.world.settings.model_dump_json()]
    for key in (ASKED, ADMIN, f"{ASKED}-typo"):
        for method, path, options in (*ASKS, *CHANGES):
            answer = client(method, path, **options, headers=bearer(key))
            said.append(answer.text + str(answer.headers))
    said += [client("GET", "/metrics").text, caplog.text]
    assert not [text for text in said if ASKED in text or ADMIN in text]


def test_changes_are_logged_with_the_request(client, caplog):
    caplog.set_level(logging.INFO, logger="server.api")
    for method, path, options in CHANGES:
        client(method, path, **options, headers={"x-request-id": f"mine-{method}"})
    for words in (
        "adapter stored name=tax",
        "adapter rolled back name=legal",
        "adapter removed name=legal",
        "adapter removed name=medical request_id=mine-DELETE",
        "request_id=mine-PUT",
    ):
        assert words in caplog.text


def test_addresses_of_this_machine():
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.evil.example"):
        assert not is_loopback(host)
    assert is_loopback(Settings(model="m").host)
