"""/tokenize and /detokenize agree with what completions are made of."""

import pytest

from tests.server.api.conftest import error


def tokenize(client, **body):
    return client("POST", "/tokenize", json=body)


def test_a_prompt(client, world):
    body = tokenize(client, prompt="the patient").json()
    client.complete(prompt="the patient")
    assert tuple(body["tokens"]) == world.engine.submits[-1].prompt
    assert body == {
        "count": len(body["tokens"]),
        "max_model_len": 64,
        "tokens": body["tokens"],
        "token_strs": None,
    }
    bare = tokenize(client, prompt="the patient", add_special_tokens=False).json()
    assert bare["tokens"] == list(world.tokenizer.encode("the patient", add_special_tokens=False))
    assert tokenize(client, prompt="").json()["count"] == len(world.tokenizer.encode(""))


def test_a_conversation(client, world):
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]
    ids = tokenize(client, messages=messages).json()["tokens"]
    client("POST", "/v1/chat/completions", json={"messages": messages})
    assert tuple(ids) == world.engine.submits[-1].prompt
    assert world.tokenizer.decode(ids) == "[system]be brief[user]hi[assistant]"
    open_ended = tokenize(client, messages=messages, add_generation_prompt=False).json()["tokens"]
    assert world.tokenizer.decode(open_ended) == "[system]be brief[user]hi"


def test_names_and_back(client, world):
    body = tokenize(client, prompt="the café 🙂", return_token_strs=True).json()
    assert len(body["token_strs"]) == body["count"] > 0
    assert all(isinstance(name, str) for name in body["token_strs"])
    (end,) = world.serving.served.eos_token_ids
    response = client("POST", "/detokenize", json={"tokens": [*body["tokens"], end]})
    assert response.json() == {"prompt": world.tokenizer.decode_verbatim([*body["tokens"], end])}
    assert response.json()["prompt"].startswith("the café 🙂") or "the café 🙂" in response.json()["prompt"]
    assert response.json()["prompt"] != world.tokenizer.decode(body["tokens"]), "the end is shown"
    assert client("POST", "/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize("fields", [{"model": "legal"}, {"adapter": "legal"}, {"model": "base:legal"}])
def test_who_would_answer(client, fields):
    assert tokenize(client, prompt="a", **fields).json() == tokenize(client, prompt="a").json()


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/tokenize", {}, 400, "invalid_value", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "invalid_value", "messages"),
        (
            "/tokenize",
            {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
            400,
            "invalid_value",
            "prompt",
        ),
        ("/tokenize", {"prompt": [1, 2]}, 400, "invalid_value", "prompt"),
        ("/tokenize", {"messages": [{"role": "x", "content": "a"}]}, 400, "invalid_value", "messages.0.role"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            400,
            "invalid_value",
            "add_special_tokens",
        ),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tokenize": True}},
            400,
            "unsupported_parameter",
            "chat_template_kwargs.tokenize",
        ),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}, 404, "model_not_found", "model"),
        ("/detokenize", {}, 400, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": [10**9]}, 400, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": [1.5]}, 400, "invalid_value", "tokens.0"),
        ("/detokenize", {"tokens": [1], "adapter": "nobody"}, 404, "adapter_not_found", "adapter"),
    ],
)
def test_what_cannot_be(client, path, body, status, code, param):
    response = client("POST", path, json=body)
    found = error(response)
    assert (response.status_code, found["code"], found["param"]) == (status, code, param)
