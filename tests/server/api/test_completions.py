"""POST /v1/completions: shapes, parameters, stop strings, usage, and what is refused."""

from dataclasses import replace

import pytest

from server.engine.sequence import Sampling
from tests.server.api.conftest import error, events

TEXT = " the court grants relief"


def test_the_whole_answer(client, world):
    response = client.complete(max_tokens=50)
    body = response.json()
    prompt, reply = len(world.tokenizer.encode("the patient")), len(world.tokenizer.encode(TEXT))
    assert response.status_code == 200
    assert body == {
        "id": "cmpl-" + response.headers["x-request-id"],
        "object": "text_completion",
        "created": body["created"],
        "model": "base",
        "adapter": None,
        "adapter_generation": None,
        "choices": [
            {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply},
    }


def test_the_stream_is_the_whole_answer_in_pieces(client):
    whole = client.complete(max_tokens=50, adapter="legal").json()
    response = client.complete(max_tokens=50, adapter="legal", stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-adapter-generation"] == "1" * 64
    chunks = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert {(c["id"], c["created"], c["model"], c["adapter"], c["adapter_generation"]) for c in chunks} == {
        (chunks[0]["id"], chunks[0]["created"], "legal", "legal", "1" * 64)
    }
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_in_a_last_chunk_and_is_null_before(client):
    chunks = events(client.complete(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    running = events(client.complete(stream=True, stream_options={"continuous_usage_stats": True}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in running]
    assert counts == sorted(counts)
    assert all(count > 0 for count in counts)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text_and_ends_the_sequence(client, world, stream):
    response = client.complete(max_tokens=50, stop=["nts rel", "zzz"], stream=stream)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response)]
        text, last = "".join(choice["text"] for choice in choices), choices[-1]
    else:
        last = response.json()["choices"][0]
        text = last["text"]
        assert response.json()["usage"]["completion_tokens"] <= len(world.tokenizer.encode(TEXT))
    assert text == " the court gra"
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "nts rel")
    assert world.engine.aborted == 1


def test_the_end_of_sequence_token_is_counted_but_not_shown(client, world):
    (end,) = world.serving.served.eos_token_ids
    world.engine.reply = lambda submit: (*world.tokenizer.encode("ab"), end, *world.tokenizer.encode("cd"))
    body = client.complete().json()
    assert body["choices"][0]["text"] == "ab"
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == ("stop", None)
    assert body["usage"]["completion_tokens"] == len(world.tokenizer.encode("ab")) + 1
    ignored = client.complete(ignore_eos=True).json()
    assert ignored["choices"][0]["text"] == "abcd"
    b = world.tokenizer.encode("ab")[-1]
    mine = client.complete(stop_token_ids=[b]).json()["choices"][0]
    assert (mine["finish_reason"], mine["stop_reason"]) == ("stop", b)
    asked = client.complete(stop_token_ids=[end], ignore_eos=True).json()["choices"][0]
    assert (asked["text"], asked["stop_reason"]) == ("ab", end), "it ended the text because it was asked for"


def test_prompts_in_every_shape(client, world):
    ids = list(world.tokenizer.encode("the patient"))
    for prompt, expected in (
        ("the patient", [ids]),
        (ids, [ids]),
        (["the patient", "a"], None),
        ([ids, [3]], None),
    ):
        world.engine.submits.clear()
        body = client.complete(prompt=prompt).json()
        sent = [list(submit.prompt) for submit in world.engine.submits]
        assert sent == (expected or [ids, sent[1]])
        assert [choice["index"] for choice in body["choices"]] == list(range(len(sent)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, sent))


def test_choices_are_prompt_major_and_draw_with_seed_plus_k(client, world):
    world.engine.reply = lambda submit: world.tokenizer.encode(f"{submit.prompt[0]}/{submit.sampling.seed}")
    body = client.complete(prompt=[[5], [6]], n=3, seed=2**63 - 2, max_tokens=60).json()
    texts = [choice["text"] for choice in body["choices"]]
    seeds = [2**63 - 2, 2**63 - 1, -(2**63)]
    assert texts == [f"{prompt}/{seed}" for prompt in (5, 6) for seed in seeds]
    assert body["usage"]["prompt_tokens"] == 2
    chunks = events(client.complete(prompt=[[5], [6]], n=3, seed=1, stream=True))
    by_index = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            by_index[choice["index"]] = by_index.get(choice["index"], "") + choice["text"]
    assert by_index == {p * 3 + k: f"{5 + p}/{1 + k}" for p in range(2) for k in range(3)}


def test_without_a_seed_every_prompt_draws_its_own(client, world):
    client.complete(prompt=[[5], [5]], n=2)
    seeds = [submit.sampling.seed for submit in world.engine.submits]
    assert seeds[1] == seeds[0] + 1
    assert len(set(seeds)) == 4


def test_sampling_comes_from_the_request_or_the_models_defaults(client, world):
    (end,) = world.serving.served.eos_token_ids
    client.complete(seed=7)
    client.complete(seed=7, temperature=0, top_p=0.5, top_k=-1, max_tokens=3, stop_token_ids=[4])
    own = {"min_p": 0.2, "repetition_penalty": 0.5, "presence_penalty": -1, "frequency_penalty": 2}
    client.complete(seed=7, **own, logit_bias={"5": -100, "0": 1.5}, min_tokens=2, logprobs=3)
    client.complete(seed=7, min_p=0, repetition_penalty=1, echo=True, logprobs=0)
    authors = {"min_p": 0.1, "repetition_penalty": 1.2}
    assert [submit.sampling for submit in world.engine.submits] == [
        Sampling(16, 0.5, 0.9, 20, 7, frozenset({end}), **authors),
        Sampling(3, 0.0, 0.5, 0, 7, frozenset({end, 4}), **authors),
        Sampling(16, 0.5, 0.9, 20, 7, frozenset({end}), **own, logit_bias=((5, -100.0), (0, 1.5)), min_tokens=2,
                 logprobs=3),
        Sampling(16, 0.5, 0.9, 20, 7, frozenset({end}), logprobs=0, prompt_logprobs=0),
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_token_that_the_model_does_not_have_is_refused_in_text_too(client, world, path):
    """As when tokens were added to the tokenizer alone; the embedding would fail, on a GPU for everybody."""
    last = world.tokenizer.vocab_size - 1
    world.serving.served = replace(world.serving.served, vocab_size=last)
    text = world.tokenizer.name(last)
    said = {"prompt": ["a", text]} if path == "/v1/completions" else {}
    response = client("POST", path, json=said or {"messages": [{"role": "user", "content": text}]})
    assert (response.status_code, error(response)["code"]) == (400, "invalid_value")
    assert error(response)["param"] == ("prompt" if said else "messages")
    assert repr(text) in error(response)["message"]
    assert world.engine.submits == []


def test_one_request_id_may_run_twice_at_once(client, world):
    call = ("POST", "/v1/completions", {"json": {"prompt": "a"}, "headers": {"x-request-id": "mine"}})
    world.engine.delay = 0.001
    answers = client.together([call, call])
    assert [answer.json()["id"] for answer in answers] == ["cmpl-mine"] * 2


def test_the_length_is_bound_by_the_context(client, world):
    response = client.complete(prompt=[1] * 64)
    assert (response.status_code, error(response)["code"]) == (400, "context_length_exceeded")
    response = client.complete(prompt=[1] * 60, max_tokens=5)
    assert (response.status_code, error(response)["param"]) == (400, "prompt")
    assert error(response)["message"].startswith("this model's maximum context length is 64 tokens"), (
        "LiteLLM looks for these words"
    )
    assert client.complete(prompt=[1] * 60, max_tokens=4).status_code == 200
    assert client.complete(prompt=[1] * 60).status_code == 200
    assert world.engine.submits[-1].sampling.max_tokens == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("seed", 2**63),
        ("seed", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", "1"),
        ("frequency_penalty", -2.1),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1000000": 1}),
        ("logit_bias", {"9" * 30: 1}),
        ("logit_bias", {str(id): 1 for id in range(301)}),
        ("logit_bias", [5, 1]),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("echo", "yes"),
        ("n", 0),
        ("n", 17),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [10**6]),
        ("adapter", ""),
        ("adapter", 5),
        ("model", ["base"]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", None),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [True]),
        ("prompt", [10**6]),
        ("prompt", [-1]),
        ("prompt", [[3], [10**30]]),
        ("prompt", [[3]] * 300),
    ],
)
def test_a_wrong_field_is_named(client, world, field, value):
    response = client.complete(**{field: value})
    found = error(response)
    assert response.status_code == 400
    assert (found["type"], found["code"]) == ("invalid_request_error", "invalid_value")
    assert found["param"].split(".")[0] == field
    assert len(found["message"]) < 300
    assert world.engine.submits == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("top_logprobs", 2),
        ("prompt_logprobs", 1),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("suffix", "end"),
        ("guided_json", {}),
        ("guided_choice", ["a"]),
        ("structured_outputs", {"regex": "a"}),
        ("response_format", {"type": "json_object"}),
        ("use_beam_search", True),
        ("prompt_embeds", "aaaa"),
        ("lora_path", "legal"),
    ],
)
def test_what_is_known_but_not_served_is_refused(client, field, value):
    response = client.complete(**{field: value})
    found = error(response)
    assert (response.status_code, found["code"], found["param"]) == (400, "unsupported_parameter", field)


def test_neutral_values_and_unknown_fields_change_nothing(client):
    neutral = {
        "best_of": 1,
        "echo": False,
        "logprobs": None,
        "suffix": None,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_p": 0,
        "min_tokens": 0,
        "top_logprobs": 0,
        "response_format": {"type": "text"},
        "user": "someone",
        "never_heard_of": [1],
        "seed": None,
        "stop": [],
        "stream": None,
    }
    assert client.complete(**neutral).status_code == 200


def test_numbers_that_are_none(client):
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        content = '{"prompt": "a", "temperature": ' + number + "}"
        headers = {"content-type": "application/json"}
        response = client("POST", "/v1/completions", content=content, headers=headers)
        assert response.status_code == 400
        assert error(response)["type"] == "invalid_request_error"
