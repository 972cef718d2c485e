"""Equal beginnings are computed once, also when they arrive together; who waits for them loses no more than that."""

import asyncio

import pytest

from server.errors import LoraplexError
from tests.engine.fakes import Bench, Parts, make_adapter, read, sequence, submit

PROMPT = [i % 20 for i in range(101)]
ADAPTERS = [make_adapter("a"), make_adapter("b")]


def step(parts):
    """(name, tokens) of the next step; they count as computed."""
    batch = parts.scheduler.schedule()
    parts.scheduler.check()
    for item in batch:
        samples = item.samples
        item.sequence.computed += item.count
        if samples:
            item.sequence.tokens.append(1)
    return [(item.sequence.request_id, item.count) for item in batch]


def add(parts, *asked):
    for one in asked:
        parts.scheduler.add(one)


def same(*names, prompt=PROMPT, **given):
    return [sequence(prompt, name=name, **given) for name in names]


def of_one_prompt(count, **given):
    return [submit(f"x-{k}", PROMPT, max_tokens=4, temperature=1.0, seed=k, **given) for k in range(count)]


async def read_all(engine, asked):
    return await asyncio.gather(*[read(engine, one) for one in asked], return_exceptions=True)


@pytest.mark.parametrize("generation", [None, "a"])
@pytest.mark.parametrize("tokens", [16, 512])
def test_equal_prompts_that_arrive_together_are_computed_once(generation, tokens):
    asked = of_one_prompt(4, generation=generation)
    with Bench(ADAPTERS, blocks=128, tokens=tokens) as bench:
        results = asyncio.run(read_all(bench.engine, asked))
    assert [given for given, _ in results] == [bench.solo(one) for one in asked]
    assert sum(len(each.token_ids) for each in bench.runner.steps) == 101 + 3 + 4 * 3
    assert bench.scheduler.prefix_hits == 3 * 100
    bench.assert_nothing_is_held()


def test_who_follows_starts_in_the_step_after_the_last_chunk_it_waits_for():
    parts = Parts([], blocks=128, tokens=64, chunk=8)
    add(parts, *same("leads", "follows"), sequence([*PROMPT[:40], 21, 22], name="parts"))
    assert step(parts) == [("leads", 64)]
    assert step(parts) == [("leads", 37), ("parts", 2)], "what it shares is there already"
    assert step(parts) == [("leads", 1), ("parts", 1), ("follows", 1)]


def test_another_adapters_blocks_are_not_waited_for_nor_those_of_a_prompt_to_be_scored():
    parts = Parts(ADAPTERS, blocks=128, tokens=512)
    parts.loader.here |= {"a", "b"}
    add(parts, *same("a", generation="a"), *same("b", generation="b"), *same("none"))
    add(parts, *same("scored", prompt_logprobs=0))
    assert step(parts) == [("a", 101), ("b", 101), ("none", 101), ("scored", 101)]


@pytest.mark.parametrize("ends", ["retire", "_preempt"])
def test_who_follows_goes_on_by_itself_when_the_first_has_gone(ends):
    parts = Parts([], blocks=128, tokens=16, chunk=8)
    add(parts, *same("leads", "follows", "too"))
    assert step(parts) == [("leads", 16)]
    getattr(parts.scheduler, ends)(parts.scheduler.find("leads"))
    first = "leads" if ends == "_preempt" else "follows"
    assert step(parts) == [(first, 16)], "all but what had been computed"
    for _ in range(20):
        step(parts)
    assert not parts.scheduler.waiting


@pytest.mark.parametrize("tokens", [16, 512])
def test_a_first_that_fails_takes_nobody_with_it(tokens):
    asked = of_one_prompt(3)
    asked[0] = submit("bad", [*PROMPT[:-1], 23], max_tokens=4)
    with Bench(blocks=128, tokens=tokens) as bench:
        bench.runner.poison[23] = ValueError("poison")
        bad, *good = asyncio.run(read_all(bench.engine, asked))
    assert isinstance(bad, LoraplexError)
    for one, result in zip(asked[1:], good, strict=True):
        poisoned = 23 in bench.solo(one)[:-1]
        assert isinstance(result, LoraplexError) if poisoned else result[0] == bench.solo(one)
    bench.assert_nothing_is_held()


def test_a_seat_and_blocks_are_kept_for_who_follows():
    parts = Parts([], blocks=128, tokens=128, chunk=8, sequences=2)
    add(parts, *same("leads", "follows"), sequence([21, 22], name="young"))
    assert step(parts) == [("leads", 101)], "the younger one would sit there for as long as it runs"
    assert step(parts) == [("leads", 1), ("follows", 1)]

    parts = Parts([], blocks=60, tokens=128, chunk=8, sequences=4)
    add(parts, *same("leads", "follows"), sequence([21] * 30, name="young"), sequence([22] * 8, name="short"))
    assert step(parts) == [("leads", 101), ("short", 8)]
    assert step(parts) == [("leads", 1), ("short", 1), ("follows", 1), ("young", 30)]


def test_others_go_past_who_follows_and_are_not_counted():
    parts = Parts([], blocks=128, tokens=128, chunk=8)
    add(parts, *same("leads", "follows"), sequence([21, 22], name="young"))
    assert step(parts) == [("leads", 101), ("young", 2)]
    assert parts.scheduler.find("follows").passed == 0


def test_who_follows_does_not_stop_a_text_that_goes_another_way():
    """Only the block that is being computed now is waited for."""
    parts = Parts([], blocks=128, tokens=128, chunk=8)
    add(parts, *same("leads"), sequence([21, *PROMPT[1:]], name="other"))
    assert step(parts) == [("leads", 101), ("other", 27 // 8 * 8)]
