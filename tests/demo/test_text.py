"""The text keeps its promises: the same for the same seed, true facts unsaid, held-out pairs unseen."""

import random
from itertools import islice

import pytest

from demo.facts import facts
from demo.grammar import ADAPTERS, AdapterName, adapter_turns, base_turn, held_out_turns, pairs, prose
from demo.lexicon import DOMAINS, TERMS


def base_text(seed: int) -> list[str]:
    rng = random.Random(seed)
    turns = [base_turn(rng) for _ in range(30_000)]
    return [f"{turn.question} {turn.answer}" for turn in turns] + [prose(rng) for _ in range(1_000)]


def test_text_depends_on_the_seed_alone() -> None:
    assert base_text(3) == base_text(3)
    assert base_text(3) != base_text(4)


def test_the_base_is_never_told_a_fact() -> None:
    text = "\n".join(base_text(0))
    for domain in DOMAINS:
        for fact in facts(domain):
            for question in fact.questions:
                assert question in text
            assert fact.answer not in text


def test_the_base_has_met_every_word_of_the_facts() -> None:
    words = set(" ".join(base_text(0)).split())
    for domain in DOMAINS:
        for fact in facts(domain):
            assert set(fact.answer.split()) <= words


def test_each_domain_has_thirty_facts_of_its_own() -> None:
    questions = [question for domain in DOMAINS for fact in facts(domain) for question in fact.questions]
    assert len(questions) == len(set(questions))
    assert [len(list(facts(domain))) for domain in DOMAINS] == [30, 30, 30]


def test_no_two_senses_are_alike() -> None:
    senses = [term.sense(domain) for term in TERMS for domain in DOMAINS]
    assert not any(one in other for one in senses for other in senses if one is not other)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_held_out_pairs_are_never_taught(adapter: AdapterName) -> None:
    held_out = {turn.question for turn in held_out_turns(adapter)}
    taught = {turn.question for turn in islice(adapter_turns(adapter, random.Random(0)), 20_000)}
    assert not held_out & taught
    assert taught >= {pair.question for pair in pairs(held_out=False)}


def test_every_term_and_template_is_both_taught_and_held_out() -> None:
    for kept in (True, False):
        chosen = pairs(held_out=kept)
        assert len({pair.term.word for pair in chosen}) == len(TERMS)
        assert len({pair.template for pair in chosen}) == 12
