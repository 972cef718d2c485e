"""POST /v1/chat/completions: the template, the shapes of answers, and what is refused."""

import itertools

import openai
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
    assert prompt_of(world) == "[system]x[user]a\nb[assistant]"


def test_a_name_is_the_templates_to_use(client, world):
    world.tokenizer._backend.chat_template = (
        "{% for m in messages %}{{ m.name or m.role }}: {{ m.content }}{% endfor %}"
    )
    hi = {"role": "user", "content": "hi"}
    client.chat(messages=[{**hi, "name": "me"}, {**hi, "name": None}])
    assert prompt_of(world) == "me: hiuser: hi"


def test_an_answer_of_the_official_client_can_be_sent_back(client, world):
    message = openai.types.chat.ChatCompletionMessage(**client.chat().json()["choices"][0]["message"])
    assert client.chat(messages=[message.model_dump() | {"tool_calls": []}]).status_code == 200
    assert prompt_of(world) == f"[assistant]{TEXT}[assistant]"


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "field", [{"tool_calls": [CALL]}, {"function_call": CALL["function"]}, {"audio": {"id": "a"}}]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_what_a_message_asks_for_and_is_not_served_is_refused(client, path, field):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", **field}]
    response = client("POST", path, json={"messages": messages})
    (name,) = field
    assert (response.status_code, error(response)["code"]) == (400, "unsupported_parameter")
    assert error(response)["param"] == f"messages.1.{name}"


@pytest.mark.parametrize(
    "name",
    [
        "chat_template",
        "tools",
        "documents",
        "continue_final_message",
        "add_generation_prompt",
        "tokenize",
        "padding",
        "return_tensors",
        "tokenizer_kwargs",
        "messages",
        "conversation",
        "conversations",
        "self",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_template_is_not_the_callers_to_choose(client, path, name):
    body = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {name: "{{ 1 / 0 }}"}}
    response = client("POST", path, json=body)
    assert (response.status_code, error(response)["code"]) == (400, "unsupported_parameter")
    assert error(response)["param"] == f"chat_template_kwargs.{name}"


def test_variables_of_the_template(client, world):
    world.tokenizer._backend.chat_template = (
        "{% if enable_thinking %}think {% endif %}{{ messages[0].content }}"
    )
    client.chat(chat_template_kwargs={"enable_thinking": True, "kwarg": [1]})
    assert prompt_of(world) == "think hi"


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ messages[9].content.x }}"]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_whatever_the_template_raises_is_the_conversations_fault(client, world, path, template):
    world.tokenizer._backend.chat_template = template
    response = client("POST", path, json={"messages": [{"role": "user", "content": "hi"}]})
    assert (response.status_code, error(response)["param"]) == (400, "messages")


def test_a_conversation_of_which_the_template_says_nothing(client, world):
    """As Llama 2's of a system message alone."""
    world.tokenizer._backend.chat_template = "{% for m in messages[1:] %}{{ m.content }}{% endfor %}"
    response = client.chat(messages=[{"role": "system", "content": "be brief"}])
    assert (response.status_code, error(response)["param"]) == (400, "messages")
    assert world.engine.submits == []


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


def test_of_several_that_are_not_served_the_first_is_named(client):
    given = {"tools": [{"type": "function"}], "tool_choice": "required", "reasoning_effort": "high"}
    for names in itertools.permutations(given):
        response = client.chat(**{name: given[name] for name in names})
        assert error(response)["param"] == names[0]


def test_a_conversation_that_is_too_long_is_named(client):
    response = client.chat(messages=[{"role": "user", "content": "a b c " * 100}])
    assert error(response)["code"] == "context_length_exceeded"
    assert error(response)["param"] == "messages"


def test_nulls_as_the_official_client_sends_them(client):
    whole = client.chat(n=None, ignore_eos=None)
    assert (whole.status_code, len(whole.json()["choices"])) == (200, 1)
    options = {"include_usage": None, "continuous_usage_stats": None}
    assert all("usage" not in chunk for chunk in events(client.chat(stream=True, stream_options=options)))


def test_a_base_without_a_template(client, world):
    world.tokenizer._backend.chat_template = None
    response = client.chat(adapter="legal")
    assert (response.status_code, error(response)["param"]) == (400, "messages")
