"""Logprobs and echo as clients see them: shapes, offsets, streams that add up, and what a stop string leaves."""

import pytest

from server.api.generation import Choice, Echo, Transcript
from server.engine.sequence import Logprobs, Sampling, Submit
from server.text.tokenizer import Tokenizer
from tests.server.api.conftest import error, events
from tests.server.fakes import logprobs_of
from tests.server.text import samples

TEXT = " the court grants relief"
PROMPT = "the patient"
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def whole(client, **body):
    """The only choice of a completion, and its usage."""
    reply = client.complete(**{"max_tokens": 50, "logprobs": 2, **body}).json()
    (choice,) = reply["choices"]
    return choice, reply["usage"]


def streamed(client, **body):
    """The same from a stream, put together by index, and the chunks."""
    chunks = events(client.complete(**{"max_tokens": 50, "logprobs": 2, **body}, stream=True))
    found = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        one = found.setdefault(choice["index"], {"text": "", "logprobs": {name: [] for name in LISTS}})
        one["text"] += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            one["logprobs"][name] += values
    return found, chunks


def test_a_completions_logprobs(client, world):
    choice, usage = whole(client)
    prompt, ids = len(world.tokenizer.encode(PROMPT)), world.tokenizer.encode(TEXT)
    logprobs, name = choice["logprobs"], world.tokenizer.name
    assert list(logprobs) == list(LISTS)
    assert logprobs["tokens"] == [name(id) for id in ids]
    assert "".join(logprobs["tokens"]) == choice["text"] == TEXT
    assert logprobs["token_logprobs"] == [-0.5 - prompt - at for at in range(len(ids))]
    assert logprobs["top_logprobs"] == [
        {name(id + 1): -0.25 - prompt - at, name(id): -0.5 - prompt - at} for at, id in enumerate(ids)
    ]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert TEXT[offset:].startswith(token)
    assert usage["completion_tokens"] == len(ids)


def test_the_chosen_token_is_always_among_those_told(client):
    choice, _ = whole(client, logprobs=0)
    assert [list(top.values()) for top in choice["logprobs"]["top_logprobs"]] == [
        [logprob] for logprob in choice["logprobs"]["token_logprobs"]
    ]
    choice, _ = whole(client, logprobs=1)
    assert {len(top) for top in choice["logprobs"]["top_logprobs"]} == {2}


def test_not_asked_for_there_are_none(client, world):
    assert whole(client, logprobs=None)[0]["logprobs"] is None
    assert whole(client, logprobs=None, echo=True)[0]["logprobs"] is None
    assert all(submit.sampling.prompt_logprobs is None for submit in world.engine.submits)


REPLIES = {
    "words": TEXT,
    "half characters": "日本 ᚠ and 😀 done",
    "a half character at the end": None,
    "an end": None,
}


@pytest.fixture(params=REPLIES)
def reply(request, world):
    """Makes the engine answer so."""
    encode = world.tokenizer.encode
    (end,) = world.serving.served.eos_token_ids
    ids = {
        "a half character at the end": (*encode(" a "), encode("ᚠ")[0]),
        "an end": (*encode(" a b"), end, *encode(" c")),
    }.get(request.param) or encode(REPLIES[request.param])
    world.engine.reply = lambda submit: ids
    return ids


@pytest.mark.parametrize("stop", [None, ["gran"], ["one"], ["ᚠ a", "b c"], ["本"]])
@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_adds_up_to_the_whole(client, reply, stop, echo):
    choice, usage = whole(client, stop=stop, echo=echo)
    found, chunks = streamed(client, stop=stop, echo=echo, stream_options={"continuous_usage_stats": True})
    assert found[0] == {"text": choice["text"], "logprobs": choice["logprobs"]}
    assert chunks[-1]["usage"] == usage
    told = usage["completion_tokens"] + (usage["prompt_tokens"] if echo else 0)
    assert {len(choice["logprobs"][name]) for name in LISTS} == {told}
    assert not any("\ufffd" in token for token in choice["logprobs"]["tokens"])
    so_far = usage["prompt_tokens"] if echo else 0
    for chunk in chunks:
        so_far -= len((chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"])
        assert so_far == -chunk["usage"]["completion_tokens"]


def test_each_chunk_tells_of_the_tokens_of_its_text(client):
    _, chunks = streamed(client)
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert chunks[-1]["choices"][0]["logprobs"] is None, "no token came with the end"


def test_a_character_of_several_tokens(client, world):
    ids = world.tokenizer.encode("a ᚠb")
    world.engine.reply = lambda submit: ids
    choice, _ = whole(client)
    assert choice["logprobs"]["tokens"] == ["a", " ", r"bytes:\xe1", r"bytes:\x9a", r"bytes:\xa0", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 2, 2, 3]
    _, chunks = streamed(client)
    told = [
        (c["choices"][0]["text"], (c["choices"][0]["logprobs"] or {"tokens": []})["tokens"]) for c in chunks
    ]
    assert ("ᚠ", [r"bytes:\xe1", r"bytes:\x9a", r"bytes:\xa0"]) in told


def test_tokens_of_a_stop_string_are_told_though_not_shown(client, world):
    choice, usage = whole(client, stop="nts rel")
    assert choice["text"] == " the court gra"
    said = "".join(choice["logprobs"]["tokens"])
    assert said.startswith(" the court grants rel")
    assert len(choice["logprobs"]["tokens"]) == usage["completion_tokens"]


def test_the_end_of_sequence_token_is_told(client, world):
    (end,) = world.serving.served.eos_token_ids
    world.engine.reply = lambda submit: (*world.tokenizer.encode("ab"), end)
    choice, _ = whole(client)
    assert choice["text"] == "ab"
    assert (choice["logprobs"]["tokens"][-1], choice["logprobs"]["text_offset"][-1]) == ("</s>", 2)


def test_stop_strings_are_looked_for_after_min_tokens(client, world):
    ids = world.tokenizer.encode("a b a b a b")
    world.engine.reply = lambda submit: ids
    assert whole(client, stop="a")[0]["text"] == ""
    choice, _ = whole(client, stop="a", min_tokens=4)
    tokens = [world.tokenizer.name(id) for id in ids]
    assert choice["text"] == "".join(tokens[:4]) + "".join(tokens[4:]).partition("a")[0]
    assert choice["stop_reason"] == "a"


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_begins_with_the_prompt(client, world, as_ids):
    ids = world.tokenizer.encode(PROMPT)
    choice, usage = whole(client, prompt=list(ids) if as_ids else PROMPT, echo=True, logprobs=1)
    logprobs, name = choice["logprobs"], world.tokenizer.name
    assert choice["text"] == PROMPT + TEXT
    assert logprobs["tokens"][: len(ids)] == [name(id) for id in ids]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["token_logprobs"][1:] == [-0.5 - at for at in range(1, len(logprobs["tokens"]))]
    assert logprobs["text_offset"][len(ids)] == len(PROMPT)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert usage["prompt_tokens"] == len(ids)


def test_what_lm_eval_asks_for(client, world):
    """Token ids, echo, one logprob, and a token or none to come."""
    ids = list(world.tokenizer.encode(PROMPT))
    for max_tokens in (0, 1):
        body = client.complete(
            prompt=[ids, ids[:3], [5]], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
        )
        for choice, prompt in zip(body.json()["choices"], (ids, ids[:3], [5]), strict=True):
            logprobs = choice["logprobs"]
            assert {len(logprobs[name]) for name in LISTS} == {len(prompt) + max_tokens}
            assert logprobs["token_logprobs"][0] is None
            assert all(value is not None for value in logprobs["token_logprobs"][1:])
            assert choice["text"].startswith(world.tokenizer.decode(prompt))
            assert choice["finish_reason"] == "length"
        assert body.json()["usage"]["completion_tokens"] == 3 * max_tokens


def test_echo_alone_without_tokens_to_come(client):
    choice, usage = whole(client, echo=True, max_tokens=0, logprobs=None)
    assert (choice["text"], choice["logprobs"], usage["completion_tokens"]) == (PROMPT, None, 0)
    response = client.complete(max_tokens=0)
    assert (response.status_code, error(response)["param"]) == (400, "max_tokens")
    found, _ = streamed(client, echo=True, max_tokens=0)
    assert found[0]["text"] == PROMPT
    assert "".join(found[0]["logprobs"]["tokens"]) == PROMPT


def test_a_prompt_as_long_as_the_context_may_be_read(client):
    assert client.complete(prompt=[5] * 64, echo=True, max_tokens=0).status_code == 200
    assert client.complete(prompt=[5] * 65, echo=True, max_tokens=0).status_code == 400
    assert client.complete(prompt=[5] * 64, echo=True, max_tokens=1).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_several_prompts_and_choices(client, world, stream):
    prompts = ["one <s>two", "the patient", "naïve 日本"]
    body = {"prompt": prompts, "n": 2, "echo": True, "logprobs": 1}
    if stream:
        found, _ = streamed(client, **body)
        choices = [found[index] for index in range(6)]
    else:
        choices = client.complete(**body, max_tokens=50).json()["choices"]
    for index, choice in enumerate(choices):
        prompt = prompts[index // 2]
        ids = world.tokenizer.encode(prompt)
        assert choice["text"] == prompt + TEXT
        assert choice["logprobs"]["text_offset"][len(ids)] == len(prompt)
        assert len(choice["logprobs"]["tokens"]) == len(ids) + len(world.tokenizer.encode(TEXT))
        for token, offset in zip(
            choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True
        ):
            assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)


def test_a_prompt_that_ends_in_half_a_character_is_completed_in_each_choice(client, world):
    head, *rest = world.tokenizer.encode("ᚠ")
    world.engine.reply = lambda submit: rest
    prompt = [*world.tokenizer.encode("ab"), head]
    choices = client.complete(prompt=prompt, echo=True, logprobs=0, n=2).json()["choices"]
    assert [choice["text"] for choice in choices] == ["abᚠ"] * 2
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 1, 2, 2, 2]] * 2


def test_a_stop_string_in_the_prompt_stops_nothing(client):
    assert whole(client, echo=True, stop="patient")[0]["text"] == PROMPT + TEXT


def test_what_is_not_a_number_for_json_is_the_least_there_is(client, world, monkeypatch):
    def unlikely(id, at, top):
        found = logprobs_of(id, at, top)
        return type(found)(float("-inf"), ((id, float("-inf")),))

    monkeypatch.setattr("tests.server.fakes.logprobs_of", unlikely)
    choice, _ = whole(client)
    assert set(choice["logprobs"]["token_logprobs"]) == {-9999.0}
    assert {value for top in choice["logprobs"]["top_logprobs"] for value in top.values()} == {-9999.0}


def test_a_chats_logprobs(client, world):
    ids = world.tokenizer.encode("a ᚠ")
    world.engine.reply = lambda submit: ids
    body = client.chat(logprobs=True, top_logprobs=2).json()
    prompt, tokenizer = body["usage"]["prompt_tokens"], world.tokenizer
    (choice,) = body["choices"]
    assert list(choice["logprobs"]) == ["content", "refusal"]
    assert choice["logprobs"]["refusal"] is None
    assert choice["logprobs"]["content"] == [
        {
            "token": tokenizer.name(id),
            "logprob": -0.5 - prompt - at,
            "bytes": list(tokenizer.piece(id)),
            "top_logprobs": [
                {
                    "token": tokenizer.name(other),
                    "logprob": value - prompt - at,
                    "bytes": list(tokenizer.piece(other)),
                }
                for other, value in ((id + 1, -0.25), (id, -0.5))
            ],
        }
        for at, id in enumerate(ids)
    ]
    assert bytes(byte for each in choice["logprobs"]["content"] for byte in each["bytes"]) == "a ᚠ".encode()
    chunks = events(client.chat(logprobs=True, top_logprobs=2, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == choice["logprobs"]["content"]


def test_a_chats_logprobs_without_others(client):
    for body in ({"logprobs": True}, {"logprobs": True, "top_logprobs": 0}):
        (choice,) = client.chat(**body).json()["choices"]
        assert {tuple(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]} == {()}
    (choice,) = client.chat(logprobs=False, top_logprobs=0).json()["choices"]
    assert choice["logprobs"] is None


def test_offsets_of_a_prompt_whose_bytes_are_held_back():
    """With byte-fallback tokens a run of bytes is certain only at its end, which a special token is."""
    tokenizer = Tokenizer(samples.byte_fallback())
    text = "b€</s>a€b"
    ids = tokenizer.encode(text, add_special_tokens=False)
    echo = Echo.of(tokenizer, ids, text)
    ends = [offset for id, offset in zip(ids, echo.offsets, strict=True) if id in tokenizer.special_ids]
    assert echo.text == text
    assert ends == [text.index("</s>")]
    after = echo.detokenizer.copy()
    assert (after.add(ids[-1]), after.flush()) == ("b", "")


def test_offsets_behind_bytes_that_are_held_back():
    """As a line's end is in Llama 2: its text comes with the next token, which stands behind it all the same."""
    tokenizer = Tokenizer(samples.byte_fallback())
    text = "the\n\na€b the"
    ids = tokenizer.encode(text, add_special_tokens=False)
    transcript = Transcript(tokenizer, 0, Choice(Submit("r", (), Sampling(20)), None), ())
    for id in ids:
        transcript.add(id, Logprobs(-1.0, ()))
    transcript.end()
    piece = transcript.take()
    assert piece.text == text
    offsets = [scored.offset for scored in piece.scored]
    assert offsets == list(Echo.of(tokenizer, ids, text).offsets)
    names = [tokenizer.name(id) for id in ids]
    assert names.count("\n") == 2
    for name, offset in zip(names, offsets, strict=True):
        assert name.startswith("bytes:") or text[offset:].startswith(name.lstrip(" ") if not offset else name)


def test_a_text_keeps_the_space_that_parts_it_from_its_prompt():
    """Unlike the beginning of a text, where such a decoder leaves the first space out."""
    tokenizer = Tokenizer(samples.byte_fallback())
    prompt, the = tokenizer.encode("a"), samples.byte_fallback().convert_tokens_to_ids("▁the")
    for behind, text in ((prompt, " the"), (tokenizer.encode("</s>", add_special_tokens=False), "the")):
        for echo, before in ((None, ""), (Echo.of(tokenizer, behind, None), tokenizer.decode(behind))):
            transcript = Transcript(tokenizer, 0, Choice(Submit("r", behind, Sampling(20)), echo), ())
            transcript.add(the, None)
            transcript.end()
            assert transcript.take().text == before + text
