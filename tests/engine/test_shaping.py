"""Bias, ends, mask, penalties and min_p: what transformers and OpenAI's formula say, and no row knows of another."""

import math
from collections import Counter

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from server.engine.sampler import Pick, _shape
from tests.engine.fakes import sample, sampled, sequence

VOCAB = 40


def random_logits(rows=1, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("penalty", [0.5, 0.9, 1.3, 2.0])
def test_repetition_penalty_is_transformers(penalty):
    logits = random_logits()
    asked = sequence((3, 4, 4, 30), output=(7, 3, 7, 9), repetition_penalty=penalty)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([asked.tokens]), logits.clone())
    assert torch.equal(_shape(logits, [asked], None), theirs)
    assert not torch.equal(theirs, logits)


@pytest.mark.parametrize("penalty", [1e-20, 1e-40, 5e-324])
@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1.0])
def test_however_small_a_repetition_penalty_logits_stay_numbers(penalty, temperature):
    logits = torch.tensor([[2.0, 9.0, 0.0, -3.0]])
    asked = sequence((0,), output=(2, 3), repetition_penalty=penalty, temperature=temperature)
    assert _shape(logits, [asked], None).isfinite().all()
    assert sampled(logits, [asked]) == [0]  # of those that stand in the text, the likeliest


@pytest.mark.parametrize(
    ("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (-1.5, 0.0), (0.3, -2.0), (2.0, 2.0)]
)
def test_presence_and_frequency_are_openais_formula_over_the_output(presence, frequency):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    logits = random_logits()
    output = (7, 3, 7, 9, 7)
    asked = sequence((5, 6, 9), output=output, presence_penalty=presence, frequency_penalty=frequency)
    counts = Counter(output)
    expected = [
        value - counts[id] * frequency - (counts[id] > 0) * presence
        for id, value in enumerate(logits[0].tolist())
    ]
    torch.testing.assert_close(_shape(logits, [asked], None)[0], torch.tensor(expected))


def test_presence_and_frequency_leave_the_prompt_alone():
    logits = random_logits()
    asked = sequence((5, 6, 9), presence_penalty=2.0, frequency_penalty=2.0)
    assert torch.equal(_shape(logits, [asked], None), logits)


def test_bias_is_added_and_may_forbid_or_force():
    logits = random_logits()
    best = int(logits.argmax())
    shaped = _shape(logits, [sequence(logit_bias=((best, -100.0), (2, 1.5)))], None)
    assert shaped[0, best] == logits[0, best] - 100
    assert shaped[0, 2] == logits[0, 2] + 1.5
    untouched = [id for id in range(VOCAB) if id not in (best, 2)]
    assert torch.equal(shaped[0, untouched], logits[0, untouched])
    assert sampled(logits, [sequence(logit_bias=((11, 100.0),))]) == [11]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ends_are_forbidden_before_min_tokens_and_allowed_from_there(temperature):
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 3]] = 50.0
    given = {"min_tokens": 2, "stop_token_ids": frozenset({2, 3}), "temperature": temperature}
    for said in ((), (9,)):
        assert sampled(logits, [sequence(output=said, **given)])[0] not in (2, 3)
    assert sampled(logits, [sequence(output=(9, 9), **given)])[0] in (2, 3)


def test_where_every_token_is_forbidden_there_is_none():
    logits = torch.full((2, VOCAB), -math.inf)
    logits[:, 2] = 1.0
    ends = {"stop_token_ids": frozenset({2})}
    assert sampled(logits, [sequence(min_tokens=1, **ends), sequence(**ends)]) == [None, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_forbids_by_row(temperature):
    logits = random_logits(2)
    mask = torch.full((2, VOCAB), -math.inf)
    mask[0, 5] = mask[1, 6] = 0.0
    assert sampled(logits, [sequence(temperature=temperature)] * 2, mask=mask) == [5, 6]


@pytest.mark.parametrize("min_p", [0.02, 0.2, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p):
    temperature, count = 0.8, 3000
    logits = random_logits(seed=5)
    kept = torch.isfinite(MinPLogitsWarper(min_p)(torch.zeros(1, 1), logits / temperature))[0]
    asked = [sequence(seed=seed, temperature=temperature, min_p=min_p) for seed in range(count)]
    counts = torch.bincount(torch.tensor(sampled(logits.expand(count, -1), asked)), minlength=VOCAB)
    assert not counts[~kept].any()
    expected = torch.softmax((logits[0] / temperature).masked_fill(~kept, -math.inf), 0)
    likely = expected > 0.005
    assert counts[likely].all()
    assert (counts / count - expected).abs().max() < 0.04


def test_top_k_and_top_p_are_of_what_min_p_left():
    logits = torch.tensor([[3.0, 2.9, 2.8, 0.0]]).log_softmax(-1)
    asked = [sequence(seed=seed, temperature=1.0, min_p=0.5, top_p=0.66, top_k=3) for seed in range(300)]
    assert set(sampled(logits.expand(300, -1), asked)) == {0, 1}


def by_definition(row, asked):
    """The order that the sampler promises, one token at a time; returns the logits that are drawn from."""
    sampling, output = asked.sampling, asked.tokens[asked.prompt_length :]
    bias, counts = dict(sampling.logit_bias), Counter(output)
    for id in range(VOCAB):
        value = row[id] + bias.get(id, 0.0)
        if id in sampling.stop_token_ids and len(output) < sampling.min_tokens:
            value = -math.inf
        if id in asked.tokens:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        yield value - counts[id] * sampling.frequency_penalty - (counts[id] > 0) * sampling.presence_penalty


def mixed(rows=12):
    """Sequences that ask for all kinds of things, and some for nothing."""
    kinds = [
        {},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 0.6, "frequency_penalty": -0.3},
        {"logit_bias": ((1, 4.0), (9, -100.0)), "logprobs": 3},
        {"min_tokens": 5, "stop_token_ids": frozenset({1, 2, 3}), "repetition_penalty": 0.8},
        {"min_p": 0.1, "logprobs": 0},
        {"logprobs": 20, "top_k": 5, "top_p": 0.9, "frequency_penalty": 1.0, "logit_bias": ((3, 2.0),)},
    ]
    return [
        sequence(
            (1, 5, 9, row), output=[(row * 7 + i * i) % VOCAB for i in range(row % 5)], seed=row,
            temperature=[0.0, 1.0, 0.7][row % 3], **kinds[row % len(kinds)],
        )
        for row in range(rows)
    ]  # fmt: skip


def test_all_together_in_the_promised_order():
    logits, asked = random_logits(12), mixed()
    expected = torch.tensor(
        [list(by_definition(row, one)) for row, one in zip(logits.tolist(), asked, strict=True)]
    )
    torch.testing.assert_close(_shape(logits, asked, None), expected)


def test_each_row_alone_as_in_any_batch():
    logits, asked = random_logits(21), mixed(21)
    together = sample(logits, asked)
    assert [sample(logits[i : i + 1], asked[i : i + 1])[0] for i in range(21)] == together
    order = torch.randperm(21).tolist()
    assert sample(logits[order], [asked[i] for i in order]) == [together[i] for i in order]
    shaped = _shape(logits, asked, None)
    for row in range(21):
        assert torch.equal(_shape(logits[row : row + 1], asked[row : row + 1], None)[0], shaped[row])
    assert {type(pick) for pick in together} == {Pick}


def test_who_asks_for_nothing_costs_nothing():
    logits = random_logits(3)
    asked = [sequence(), sequence(temperature=1.0, top_p=0.5, min_p=0.1), sequence(logprobs=3)]
    assert _shape(logits, asked, None) is logits


def test_the_models_own_logits_are_left_as_they_are():
    logits, asked = random_logits(12), mixed()
    before = logits.clone()
    sample(logits, asked, mask=torch.zeros(12, VOCAB))
    assert torch.equal(logits, before)
