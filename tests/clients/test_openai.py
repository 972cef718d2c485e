"""The official client, unchanged: it is understood, it gets what it expects, and its hanging up is noticed."""

import asyncio
import io
import random
import time

import httpx
import openai
import pytest

from loadtests.archive import zipped
from tests.clients.conftest import ADAPTERS, DEMO

PROMPT = "Q: What is discharge?\nA:"
QUESTION = [{"role": "user", "content": "What is discharge?"}]


def greedy(client, model: str) -> str:
    reply = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
    assert reply.model == model
    return reply.choices[0].text


def test_completions_by_model_and_by_adapter(client):
    texts = {name: greedy(client, name) for name in ("base", *ADAPTERS)}
    assert len(set(texts.values())) == 4
    reply = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=24, temperature=0, extra_body={"adapter": "legal"}
    )
    assert reply.choices[0].text == texts["legal"]
    assert reply.model_extra["adapter"] == "legal"
    assert len(reply.model_extra["adapter_generation"]) == 64
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 24


def test_a_stream_is_the_same_text(client):
    chunks = list(
        client.completions.create(
            model="legal",
            prompt=PROMPT,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == greedy(client, "legal")
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"


def test_chat_streamed_and_not(client):
    whole = client.chat.completions.create(model="finance", messages=QUESTION, max_tokens=56, temperature=0)
    message = whole.choices[0].message
    assert message.role == "assistant"
    assert "loan" in message.content
    assert whole.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(
        model="finance", messages=QUESTION, max_tokens=56, temperature=0
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == message.content


def test_several_choices_have_seeds_of_their_own(client):
    def texts(**given) -> list[str]:
        reply = client.completions.create(
            model="legal", prompt=PROMPT, temperature=1.3, max_tokens=16, **given
        )
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.text for choice in reply.choices]

    three = texts(n=3, seed=7)
    assert three == texts(n=3, seed=7)
    assert three[1] == texts(n=1, seed=8)[0]
    assert len(set(three)) > 1


def test_logprobs_of_a_completion_streamed_and_not(client):
    given = {"model": "legal", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 3}
    (choice,) = client.completions.create(**given).choices
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert logprob == top[token] == max(top.values()), "greedy takes the likeliest"
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**given, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in parts if part for value in getattr(part, name)] == getattr(logprobs, name)


def test_logprobs_of_a_chat_streamed_and_not(client):
    given = {
        "model": "finance", "messages": QUESTION, "max_tokens": 56, "temperature": 0,
        "logprobs": True, "top_logprobs": 4,
    }  # fmt: skip
    (choice,) = client.chat.completions.create(**given).choices
    *shown, end = choice.logprobs.content
    assert bytes(byte for each in shown for byte in each.bytes).decode() == choice.message.content
    assert end.token == "<|end|>"
    for each in choice.logprobs.content:
        assert [each.top_logprobs[0].token, each.top_logprobs[0].logprob] == [each.token, each.logprob]
        assert len(each.top_logprobs) == 4
    with client.chat.completions.stream(**given) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].logprobs.content == choice.logprobs.content


def test_echo_scores_the_prompt_as_lm_eval_wants_it(client):
    given = {"model": "legal", "temperature": 0, "logprobs": 1}
    (plain,) = client.completions.create(prompt=PROMPT, max_tokens=8, **given).choices
    (echoed,) = client.completions.create(prompt=PROMPT, max_tokens=8, echo=True, **given).choices
    assert echoed.text == PROMPT + plain.text
    assert echoed.logprobs.tokens[-8:] == plain.logprobs.tokens
    assert echoed.logprobs.token_logprobs[-8:] == plain.logprobs.token_logprobs
    assert echoed.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in echoed.logprobs.token_logprobs[1:])

    (read,) = client.completions.create(prompt=PROMPT, max_tokens=0, echo=True, **given).choices
    assert read.logprobs.token_logprobs == echoed.logprobs.token_logprobs[:-8]
    several = client.completions.create(prompt=[[5, 6, 7], [8]], max_tokens=1, echo=True, **given)
    assert [len(choice.logprobs.token_logprobs) for choice in several.choices] == [4, 2]
    (base,) = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
    ).choices
    assert base.logprobs.token_logprobs != read.logprobs.token_logprobs


def test_penalties_and_biases_are_heard(client):
    """One token is made so likely that it is repeated for ever, unless that is punished."""

    def kinds(**given) -> int:
        body = {"model": "legal", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 0}
        (choice,) = client.completions.create(**body, logit_bias={"40": 100, "41": 85}, **given).choices
        return len(set(choice.logprobs.tokens))

    assert kinds() == 1
    assert kinds(frequency_penalty=2, presence_penalty=2) == 2
    assert kinds(extra_body={"repetition_penalty": 1.9}) == 2
    for least, reason in ((0, "stop"), (80, "length")):
        (choice,) = client.completions.create(
            model="legal", prompt=PROMPT, max_tokens=80, temperature=0, extra_body={"min_tokens": least}
        ).choices
        assert choice.finish_reason == reason


def test_models_and_adapters_are_listed(client):
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"base", *ADAPTERS}
    assert listed["legal"].model_extra["parent"] == "base"
    assert client.models.retrieve("legal").id == "legal"


def posted(client, file) -> dict:
    """An upload as a form, through the client."""
    multipart = {"headers": {"Content-Type": "multipart/form-data"}}
    return client.post(
        "/adapters",
        body={"name": "support"},
        files={"file": file},
        cast_to=object,
        options=multipart,
    )


def test_an_adapter_is_uploaded_as_a_form_and_removed_as_a_model(client, tmp_path):
    (tmp_path / "support.zip").write_bytes(zipped(DEMO / "adapters" / "support"))
    with (tmp_path / "support.zip").open("rb") as file:
        assert posted(client, file)["state"] == "ready"
    assert greedy(client, "support") != greedy(client, "base")
    removed = client.models.delete("support")
    assert (removed.id, removed.object, removed.deleted) == ("support", "model", True)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("support")
    with pytest.raises(openai.BadRequestError) as caught:
        posted(client, io.BytesIO(b"hello"))
    assert caught.value.code == "invalid_archive"


@pytest.mark.parametrize(
    ("given", "error", "code"),
    [
        ({"model": "unknown"}, openai.NotFoundError, "model_not_found"),
        ({"model": "base", "extra_body": {"adapter": "unknown"}}, openai.NotFoundError, "adapter_not_found"),
        ({"model": "base", "temperature": 9}, openai.BadRequestError, "invalid_value"),
        ({"model": "base", "max_tokens": 10**6}, openai.BadRequestError, "context_length_exceeded"),
        ({"model": "base", "suffix": "x"}, openai.BadRequestError, "unsupported_parameter"),
    ],
)
def test_errors_are_the_clients_own_classes(client, given, error, code):
    with pytest.raises(error) as caught:
        client.completions.create(prompt=PROMPT, **given)
    assert caught.value.code == code
    assert caught.value.request_id


def test_streams_cut_at_random_leave_nothing_behind(url):
    moments = random.Random(3)

    async def one(client: openai.AsyncOpenAI, number: int, chunks: int) -> None:
        stream = await client.completions.create(
            model=("base", *ADAPTERS)[number % 4],
            prompt=PROMPT,
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            chunks -= 1
            if chunks < 0:
                await stream.close()
                return

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(one(client, number, moments.randrange(8)) for number in range(64)))

    asyncio.run(all_of_them())
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        left = levels(url)
        if not any(left.values()):
            break
        time.sleep(0.1)
    assert not any(left.values()), left


def levels(url: str) -> dict[str, float]:
    """What running requests hold, as the server's metrics say."""
    names = ("requests_running", "requests_waiting", "kv_blocks_used", 'adapters{state="referenced"}')
    pairs = [line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[:1] != "#"]
    found = {name: float(value) for name, value in pairs}
    return {name: found[f"loraplex_{name}"] for name in names}
