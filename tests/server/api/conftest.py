"""An app over fakes, and a client that calls it in process."""

import asyncio
import json

import httpx
import pytest

from server.api.app import create_app
from tests.server import fakes
from tests.server.api.contract import Contract


@pytest.fixture
def world(tmp_path):
    return fakes.world(tmp_path)


class Client:
    """Calls the app, each call in an event loop of its own.

    Afterwards nothing may be held, and every answer must be what the OpenAPI document promises.
    """

    def __init__(self, world):
        self.world = world
        self.app = create_app(world.settings, world.serving)
        self.contract = Contract(self.app)

    def __call__(self, method, path, **options):
        return self.together([(method, path, options)])[0]

    def together(self, calls):
        async def run():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                return await asyncio.gather(
                    *[client.request(m, path, **options) for m, path, options in calls]
                )

        answers = asyncio.run(run())
        assert self.world.quiet(), "a reference or a sequence was left behind"
        for answer in answers:
            self.contract.check(answer)
        return answers

    def complete(self, **body):
        return self("POST", "/v1/completions", json={"model": "base", "prompt": "the patient", **body})

    def chat(self, **body):
        messages = [{"role": "user", "content": "hi"}]
        return self("POST", "/v1/chat/completions", json={"model": "base", "messages": messages, **body})


@pytest.fixture
def client(world):
    return Client(world)


def events(response):
    """The data of a stream's events; the last must be [DONE]."""
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def error(response):
    """The error of an envelope of exactly the promised shape."""
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) - {"details"} == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return body["error"]
