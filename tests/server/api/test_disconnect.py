"""Over real connections: a client that goes away ends its sequences and releases its adapter."""

import asyncio
import json
import socket
import threading
import time

import openai
import pytest
import uvicorn

from server.api.app import create_app
from server.api.asgi import OpenRequests

SLOW = 0.02  # seconds per token


@pytest.fixture
def port(world):
    """The app behind uvicorn on a free port."""
    world.engine.reply = lambda submit: world.tokenizer.encode("a slow reply" * 5)
    world.engine.delay = SLOW
    server = uvicorn.Server(
        uvicorn.Config(create_app(world.settings, world.serving), log_config=None, lifespan="off")
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(10)


def request(port, path, body):
    data = json.dumps(body).encode()
    head = f"HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(f"{path} {head}".encode() + data)
    return connection


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_sequences(world, port, stream, n):
    body = {"prompt": "a", "adapter": "legal", "max_tokens": 50, "stream": stream, "n": n}
    connection = request(port, "POST /v1/completions", body)
    if stream:
        assert b"200 OK" in connection.recv(4096)
    until(lambda: len(world.engine.open) == n and world.registry.held == 1)
    connection.close()
    until(world.quiet, seconds=1.0)
    assert world.engine.aborted == n


def test_a_client_that_goes_before_the_first_token(world, port):
    world.engine.delay = 60.0
    connection = request(port, "POST /v1/completions", {"prompt": "a", "adapter": "legal", "stream": True})
    until(lambda: world.engine.open and world.registry.held == 1)
    connection.close()
    until(world.quiet, seconds=1.0)


def test_an_upload_that_breaks_off_leaves_nothing(world, port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(
        b"PUT /v1/adapters/tax HTTP/1.1\r\nhost: a\r\ncontent-length: 5000000\r\n\r\n" + b"x" * 2_000_000
    )
    root = world.registry.store.root
    until(lambda: list(root.glob("*/archive")))
    connection.close()
    until(lambda: not list(root.iterdir()))
    assert "tax" not in world.registry.names


@pytest.mark.parametrize(
    ("path", "kind"),
    [("PUT /v1/adapters/tax", "zip"), ("POST /v1/completions", "json"), ("POST /tokenize", "json")],
)
def test_a_body_that_stops_arriving(world, port, monkeypatch, path, kind):
    monkeypatch.setattr("server.api.asgi.BODY_SECONDS", 1.0)
    head = f"{path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/{kind}\r\ncontent-length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head.encode())
        for _ in range(7):  # slow is not stopped
            connection.sendall(b"{")
            time.sleep(0.2)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer
    assert b"connection: close" in answer
    assert not list(world.registry.store.root.iterdir())


def test_last_words_are_not_cut_short():
    """By a second signal that comes while they are written."""

    async def scene():
        requests, said = OpenRequests(), []

        async def answer():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(0.2)
                said.append("words")

        requests.tasks.add(asyncio.create_task(answer()))
        await asyncio.sleep(0)
        first = asyncio.create_task(requests.end())
        await asyncio.sleep(0.05)
        await requests.end()
        await first
        return said

    assert asyncio.run(scene()) == ["words"]


def test_whoever_does_not_read_is_not_waited_for(world, monkeypatch):
    """At the end of the server, behind a connection that takes no more."""
    monkeypatch.setattr("server.api.asgi.LAST_WORDS_SECONDS", 0.2)
    app = create_app(world.settings, world.serving)
    world.engine.reply = lambda submit: world.tokenizer.encode("a slow reply" * 5)
    body = {"type": "http.request", "body": b'{"prompt": "a", "stream": true, "max_tokens": 50}'}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def run():
        arriving, stuck = [body], asyncio.Event()

        async def receive():
            return arriving.pop() if arriving else await asyncio.Future()

        async def send(message):
            if message["type"] == "http.response.body":
                stuck.set()
                await asyncio.Future()

        task = asyncio.create_task(app(scope, receive, send))
        await stuck.wait()
        ending = app.state.requests.end()
        await asyncio.wait_for(ending, 5)
        await asyncio.wait_for(task, 1)

    asyncio.run(run())
    assert world.quiet()


def test_the_official_client(world, port):
    world.engine.delay = 0.0
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        extra = {"adapter": "legal"}
        whole = client.completions.create(model="base", prompt="a", max_tokens=8, extra_body=extra)
        assert whole.model == "legal"
        with client.completions.create(model="base:legal", prompt="a", max_tokens=8, stream=True) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        messages = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(model="legal", messages=messages)
        assert chat.choices[0].message.content
        assert [model.id for model in client.models.list()] == ["base", "legal", "medical"]
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="base", prompt="a", extra_body={"adapter": "nobody"})
        assert missing.value.code == "adapter_not_found"
        world.engine.fail_after = 2
        stream = client.completions.create(model="base", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="internal error"), stream:
            list(stream)
    until(world.quiet)
