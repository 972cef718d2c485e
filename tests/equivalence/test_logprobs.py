"""Logprobs against transformers + peft over the whole text, and the same floats whatever runs beside.

The engine is the real one, over a tiny model: what it tells of a token while it generates, what it tells of the same
token in a prompt, and what peft's own forward of the whole text gives, are compared.
"""

import asyncio
import copy
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from server.engine.engine import Engine
from server.engine.sequence import PromptLogprobs, Sampling, Submit, Token
from server.model.servable import make_servable
from tests.engine.fakes import read_events
from tests.equivalence.harness import Harness, read_peft
from tests.equivalence.models import VOCAB, exact_twin, held_model, plain_model, with_adapters
from tests.equivalence.oracle import peft_logits

TOP = 5
NAMES = (None, "rank3", "rank64")
SHAPED = Sampling(
    12, temperature=0.9, seed=5, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3,
    logit_bias=((7, 3.0),), logprobs=TOP, prompt_logprobs=TOP,
)  # fmt: skip


@pytest.fixture(scope="module", params=["fp32", "nf4"])
def parts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    plain = plain_model("llama")
    plain.save_pretrained(folder / "base")
    held = held_model(folder / "base", request.param)
    oracle = with_adapters(exact_twin(held, plain), "llama")
    servable = make_servable(held)
    return servable, read_peft(with_adapters(copy.deepcopy(plain), "llama"), folder / "a", servable), oracle


@contextmanager
def engine(parts, **sizes):
    servable, adapters, _ = parts
    harness = Harness(servable, adapters, **sizes)
    for name in adapters:
        while harness.loader.get(name) is None:
            time.sleep(0.001)
    running = Engine(harness.runner, harness.scheduler, max_queued=64)
    running.start()
    try:
        yield running
    finally:
        running.stop(30)
        harness.loader.close()


def ask(running, *asked):
    async def all_of_them():
        return await asyncio.gather(*[read_events(running, one) for one in asked])

    return [events for events, _ in asyncio.run(asyncio.wait_for(all_of_them(), 60))]


def submits(length=45, **given):
    return [
        Submit(
            str(name),
            tuple(torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()),
            replace(SHAPED, seed=seed, **given),
            name,
        )
        for seed, name in enumerate(NAMES)
    ]


def told(events):
    """(token, its logprobs) of the prompt from its second token on, and of the output."""
    return [one.logprobs for one in events if isinstance(one, PromptLogprobs)], [
        (one.token_id, one.logprobs) for one in events if isinstance(one, Token)
    ]


def test_of_prompt_and_output_as_peft_has_them(parts):
    asked = submits()
    with engine(parts) as running:
        found = ask(running, *asked)
    for one, events in zip(asked, found, strict=True):
        (prompt,), output = told(events)
        text = [*one.prompt, *(token for token, _ in output)]
        oracle = peft_logits(parts[2], text, one.generation).log_softmax(-1)
        wrong = peft_logits(parts[2], text, "rank8").log_softmax(-1)
        for at, logprobs in enumerate([*prompt, *(logprobs for _, logprobs in output)]):
            assert logprobs.logprob == pytest.approx(float(oracle[at, text[at + 1]]), abs=2e-4)
            assert [value for _, value in logprobs.top] == pytest.approx(
                oracle[at].topk(TOP).values.tolist(), abs=2e-4
            )
            for id, value in logprobs.top:
                assert value == pytest.approx(float(oracle[at, id]), abs=2e-4)
        gap = max(abs(p.logprob - float(wrong[at, text[at + 1]])) for at, p in enumerate(prompt))
        assert gap > 0.01, "another adapter cannot be told from this one"


def test_a_token_is_told_of_the_same_in_the_output_and_in_a_prompt(parts):
    """The same floats: generated in decode steps, then read as a prompt in chunks, then taken up in part."""
    asked = submits()
    with engine(parts, tokens=128) as running:
        outputs = [told(events)[1] for events in ask(running, *asked)]
        again = [
            Submit(one.request_id, (*one.prompt, *(token for token, _ in output)),
                   Sampling(0, prompt_logprobs=TOP), one.generation)
            for one, output in zip(asked, outputs, strict=True)
        ]  # fmt: skip
        read = [told(events)[0][0] for events in ask(running, *again)]
        assert running.stats().prefix_hits == 0
        hits = ask(
            running, *[replace(one, sampling=replace(one.sampling, prompt_logprobs=None)) for one in asked]
        )
        assert running.stats().prefix_hits == 3 * 32
    for one, output, prompt, hit in zip(asked, outputs, read, hits, strict=True):
        assert list(prompt[len(one.prompt) - 1 :]) == [logprobs for _, logprobs in output]
        assert told(hit)[1] == output


@pytest.mark.parametrize("prompt_logprobs", [None, TOP])
def test_the_same_floats_beside_others_and_after_preemptions(parts, prompt_logprobs):
    """Penalties, seeds and logprobs on: each event is that of the sequence alone."""
    asked = submits(70, max_tokens=30, prompt_logprobs=prompt_logprobs)
    alone = []
    for one in asked:
        with engine(parts) as running:
            alone += ask(running, one)
    with engine(parts, blocks=17, tokens=96) as running:
        together = ask(running, *asked)
        assert running.stats().preemptions > 0
    assert together == alone
