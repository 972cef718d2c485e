"""Which adapter answers, and that nothing ever falls back."""

import random
from dataclasses import replace

import pytest

from tests.server import fakes
from tests.server.api.conftest import Client, error


@pytest.mark.parametrize(
    ("fields", "model", "adapter"),
    [
        ({"model": "base"}, "base", None),
        ({"model": "/models/base"}, "base", None),
        ({"model": None}, "base", None),
        ({"model": "base", "adapter": None}, "base", None),
        ({"model": "base", "adapter": "legal"}, "legal", "legal"),
        ({"model": None, "adapter": "legal"}, "legal", "legal"),
        ({"model": "legal"}, "legal", "legal"),
        ({"model": "base:legal"}, "legal", "legal"),
        ({"model": "/models/base:legal"}, "legal", "legal"),
        ({"model": "legal", "adapter": "legal"}, "legal", "legal"),
        ({"model": "base:legal", "adapter": "legal"}, "legal", "legal"),
    ],
)
def test_who_answers(client, world, fields, model, adapter):
    response = client.complete(**fields)
    body = response.json()
    generation = world.registry.names.get(adapter)
    assert (body["model"], body["adapter"], body["adapter_generation"]) == (model, adapter, generation)
    assert response.headers.get("x-adapter-generation") == generation
    assert world.engine.submits[-1].generation == generation
    assert world.registry.resolved == (adapter is not None)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "gpt-4"}, 404, "model_not_found", "model"),
        ({"model": "gpt-4", "adapter": "legal"}, 404, "model_not_found", "model"),
        ({"model": "other:legal"}, 404, "model_not_found", "model"),
        ({"model": "base:"}, 404, "model_not_found", "model"),
        ({"model": "base:nobody"}, 404, "adapter_not_found", "model"),
        ({"adapter": "nobody"}, 404, "adapter_not_found", "adapter"),
        ({"adapter": "base"}, 404, "adapter_not_found", "adapter"),
        ({"model": "legal", "adapter": "medical"}, 400, "invalid_value", "adapter"),
        ({"model": "base:legal", "adapter": "medical"}, 400, "invalid_value", "adapter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_who_does_not(client, world, fields, status, code, param, stream):
    response = client.complete(**fields, stream=stream)
    found = error(response)
    assert (response.status_code, found["code"], found["param"]) == (status, code, param)
    assert found["type"] == "invalid_request_error"
    assert world.engine.submits == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"adapter": "odd"}, "adapter"), ({"model": "odd"}, "model"), ({"model": "base:odd"}, "model")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_one_that_is_stored_and_does_not_fit(client, world, fields, param, stream):
    world.registry.names["odd"] = "3" * 64
    response = client.complete(**fields, stream=stream)
    found = error(response)
    assert (response.status_code, found["code"], found["type"], found["param"]) == (
        *(409, "adapter_incompatible", "conflict_error", param),
    )
    assert found["details"] == [{"where": "a", "problem": "b", "cure": ""}]
    assert response.headers["x-should-retry"] == "false"
    assert world.engine.submits == []


def test_a_running_request_keeps_its_generation(client, world):
    seen = []

    def reply(submit):
        seen.append(world.registry.held)
        world.registry.names["legal"] = "9" * 64
        return world.tokenizer.encode("done")

    world.engine.reply = reply
    body = client.complete(adapter="legal").json()
    assert body["adapter_generation"] == "1" * 64
    assert seen == [1]


def test_every_served_name_is_the_base(tmp_path):
    world = fakes.world(tmp_path, served_model_name=("base", "gpt-4"))
    client = Client(world)
    listed = client("GET", "/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["base", "gpt-4", "legal", "medical"]
    assert client("GET", "/v1/models/gpt-4").json()["id"] == "gpt-4"
    for model in ("base", "gpt-4", "/models/base"):
        reply = client.complete(model=model, prompt="a").json()
        assert (reply["model"], reply["adapter"]) == ("base", None)
    assert client.complete(model="gpt-4:legal", prompt="a").json()["adapter"] == "legal"
    put = client("PUT", "/v1/adapters/gpt-4", content=b"PK")
    assert put.json()["error"]["code"] == "invalid_adapter_name"


def test_a_path_before_the_server_may_be_there_or_taken_away_by_the_proxy(tmp_path):
    client = Client(fakes.world(tmp_path, root_path="/llm"))
    for path in ("/v1/models", "/llm/v1/models"):
        assert client("GET", path).json()["data"][0]["id"] == "base"
    assert client("GET", "/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_seeds_are_drawn_for_those_who_bring_none(tmp_path):
    world = fakes.world(tmp_path)
    client, draws = Client(world), random.Random(5)
    world.serving.served = replace(world.serving.served, seeds=random.Random(5))
    for body in ({}, {"seed": 9}, {}):
        client.complete(prompt="a", **body)
    assert [submit.sampling.seed for submit in world.engine.submits] == [
        draws.getrandbits(63),
        9,
        draws.getrandbits(63),
    ]


def test_a_base_with_a_colon_in_its_name_is_no_adapter(tmp_path):
    world = fakes.world(tmp_path, served_model_name=["base", "base:legal"])
    client = Client(world)
    assert client.complete(model="base:legal").json()["adapter"] is None
    assert client("GET", "/v1/models/base:legal").json()["parent"] is None
    refused = client("DELETE", "/v1/models/base:legal")
    assert (refused.status_code, error(refused)["param"]) == (400, "model")
    assert "legal" in world.registry.names
    assert client("GET", "/v1/models/base:medical").json()["id"] == "medical"
