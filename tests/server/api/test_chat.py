"""POST /v1/chat/completions: the template, the shapes of answers, and what is refused."""

import pytest

from tests.server.api.conftest import error, events

TEXT = " the court grants relief"


def prompt_of(world):
    return world.tokenizer.decode(world.engine.submits[-1].prompt)


def test_the_whole_answer(client, world):
    response = client.chat(adapter="legal")
    body = response.json()
    assert body["id"] == "chatcmpl-" + response.headers["x-request-id"]
    assert (body["object"], body["model"], body["adapter"]) == ("chat.completion", "legal", "legal")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert prompt_of(world) == "[user]hi[assistant]"
    assert body["usage"]["prompt_tokens"] == len(world.engine.submits[-1].prompt)


def test_the_stream(client):
    chunks = events(client.chat(stream=True, n=2, stream_options={"include_usage": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"] == []
    for index in range(2):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert mine[0]["delta"]["content"]
        assert not any("role" in choice["delta"] for choice in mine[1:])
        assert "".join(choice["delta"]["content"] for choice in mine) == TEXT
        assert mine[-1]["finish_reason"] == "length"


def test_text_parts_and_the_developer(client, world):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    client.chat(
        messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts, "name": "me"}]
    )
    assert prompt_of(world) == "[system]x[user]ab[assistant]"


def test_the_length(client, world):
    client.chat()
    submit = world.engine.submits[-1]
    assert submit.sampling.max_tokens == 64 - len(submit.prompt)
    client.chat(max_tokens=9, max_completion_tokens=3)
    assert world.engine.submits[-1].sampling.max_tokens == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"min_tokens": 9, "max_completion_tokens": 8}, "min_tokens"),
    ],
)
def test_a_wrong_field_is_named(client, body, param):
    response = client.chat(**body)
    assert (response.status_code, error(response)["param"]) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_schema"}},
        {"echo": True},
        {"prompt_logprobs": 2},
        {"chat_template": "{{ 1 }}"},
        {"continue_final_message": True},
        {"functions": [{"name": "f"}]},
        {"reasoning_effort": "high"},
    ],
)
def test_what_is_not_served_is_refused(client, body):
    response = client.chat(**body)
    assert (response.status_code, error(response)["code"]) == (400, "unsupported_parameter")


def test_a_base_without_a_template(client, world):
    world.tokenizer._backend.chat_template = None
    response = client.chat(adapter="legal")
    assert (response.status_code, error(response)["param"]) == (400, "messages")
