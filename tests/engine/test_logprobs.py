"""Logprobs of output and prompt: by the definition, of the raw logits, told once, whatever the schedule."""

import asyncio

import pytest
import torch

from server.engine.sampler import Known
from server.engine.sequence import Finished, Logprobs
from server.errors import LoraplexError
from tests.engine.fakes import Bench, logprobs_of, make_adapter, read_events, sample, sequence, submit

ADAPTERS = [make_adapter("a"), make_adapter("b", 20)]


def logits_for(rows, vocab=50):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2)) * 4


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def all_events(engine, asked):
    return await asyncio.gather(*[read_events(engine, one) for one in asked])


def test_logprobs_are_of_the_models_own_logits_whatever_is_asked_beside():
    logits = logits_for(4)
    beside = [
        {"temperature": 0.0},
        {"temperature": 1.7, "top_k": 3, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 2.0, "presence_penalty": 2.0},
        {"temperature": 0.0, "logit_bias": ((7, 100.0),)},
    ]
    picks = sample(logits, [sequence(logprobs=5, **given) for given in beside])
    assert [pick.logprobs for pick in picks] == [
        logprobs_of(row, pick.token_id, 5) for row, pick in zip(logits, picks, strict=True)
    ]
    assert picks[3].token_id == 7


def test_each_gets_as_many_as_it_asked_for():
    picks = sample(logits_for(4), [sequence(logprobs=top) for top in (3, None, 0, 20)])
    assert [None if pick.logprobs is None else len(pick.logprobs.top) for pick in picks] == [3, None, 0, 20]


def test_no_more_than_there_are_tokens():
    (pick,) = sample(logits_for(1, vocab=6), [sequence(logprobs=20)])
    assert sorted(id for id, _ in pick.logprobs.top) == list(range(6))


@pytest.mark.parametrize("beside", [1, 3, 17])
def test_of_equal_logits_the_lower_ids_come_first(beside):
    logits = torch.zeros(1 + beside, 3000)
    logits[0, 2000:] = -0.0
    logits[1:] = torch.randn(beside, 3000)
    pick, *_ = sample(logits, [sequence(logprobs=4), *[sequence(logprobs=20)] * beside])
    assert [id for id, _ in pick.logprobs.top] == [0, 1, 2, 3]


def test_negative_and_infinite_logits_are_in_order():
    logits = torch.tensor([[-3.0, float("-inf"), -1.0, 2.0, -1e30, 0.0, 1e-30, -1e-30]])
    (pick,) = sample(logits, [sequence(logprobs=8)])
    assert [id for id, _ in pick.logprobs.top] == [3, 6, 5, 7, 2, 0, 4, 1]


def test_rows_of_a_prompt_are_told_of_the_token_that_follows():
    logits = logits_for(5)
    picks = sample(logits, [sequence(), sequence(logprobs=1)], [Known(4, 2), Known(9, 0), Known(0, 7)])
    assert [pick.logprobs for pick in picks[1:]] == [
        logprobs_of(logits[1], int(logits[1].argmax()), 1),
        logprobs_of(logits[2], 4, 2),
        logprobs_of(logits[3], 9, 0),
        logprobs_of(logits[4], 0, 7),
    ]
    assert [pick.logprobs for pick in sample(logits[2:], [], [Known(4, 2), Known(9, 0), Known(0, 7)])] == [
        pick.logprobs for pick in picks[2:]
    ]


def test_each_row_alone_as_in_any_batch():
    """In a vocabulary of real size, where a row's sum has many terms."""
    logits = torch.randn(40, 32_003)
    asked = [sequence(logprobs=[None, 0, 5, 20][row % 4], temperature=row % 2, seed=row) for row in range(30)]
    known = [Known(row, row) for row in range(10)]
    together = sample(logits, asked, known)
    assert [sample(logits[i : i + 1], [asked[i]])[0] for i in range(30)] == together[:30]
    assert [sample(logits[30 + i : 31 + i], [], [known[i]])[0] for i in range(10)] == together[30:]


def test_a_row_that_is_no_numbers_has_none_and_leaves_others_alone():
    logits = logits_for(4)
    asked = [sequence(logprobs=2) for _ in range(3)]
    whole = sample(logits, asked, [Known(3, 2)])
    logits[1, 4] = torch.nan
    assert sample(logits, asked, [Known(3, 2)]) == [whole[0], None, whole[2], whole[3]]
    logits[3, 9] = float("inf")
    assert sample(logits, asked, [Known(3, 2)])[3] is None


SHAPED = {
    "temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4,
    "logit_bias": ((3, 2.0), (23, -100.0)), "min_p": 0.05, "min_tokens": 3, "stop_token_ids": frozenset({1, 2}),
    "logprobs": 2,
}  # fmt: skip


def scoring(count, length, **given):
    return [
        submit(
            str(i), [(5 * i + 3 * j) % 23 for j in range(length + i)], generation=[None, "a", "b"][i % 3],
            max_tokens=6, seed=i, prompt_logprobs=i % 4, **given,
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize(("tokens", "chunk"), [(64, 64), (16, 8), (8, 4)])
def test_events_are_those_of_each_alone_whatever_the_chunks(tokens, chunk):
    asked = scoring(5, 19, **SHAPED)
    with Bench(ADAPTERS, blocks=64, tokens=tokens, chunk=chunk) as bench:
        found = run(all_events(bench.engine, asked))
    for one, (events, last) in zip(asked, found, strict=True):
        assert events == bench.solo_events(one)
        assert last == Finished(one.request_id, last.reason, len(one.prompt), len(events) - 1)
    bench.assert_nothing_is_held()


@pytest.mark.parametrize("preempted_at", ["prefill", "decode"])
def test_after_a_preemption_nothing_is_told_twice(preempted_at):
    """Too few blocks: those that give way compute again, and say again nothing that they said."""

    async def at_once(bench):
        """None waits for an adapter, and all have come before the first has gone far."""
        await all_events(bench.engine, [submit(name, generation=name, max_tokens=1) for name in "ab"])
        bench.runner.gate.clear()
        found = asyncio.ensure_future(all_events(bench.engine, asked))
        while len(bench.engine._streams) < len(asked):
            await asyncio.sleep(0)
        bench.runner.gate.set()
        return await found

    asked = scoring(4, 8, **SHAPED | {"stop_token_ids": frozenset()})
    sizes = {"prefill": {"tokens": 8, "chunk": 4}, "decode": {"tokens": 64}}[preempted_at]
    with Bench(ADAPTERS, blocks=10, **sizes) as bench:
        found = run(at_once(bench))
    assert bench.engine.stats().preemptions > 0
    assert [events for events, _ in found] == [bench.solo_events(one) for one in asked]
    bench.assert_nothing_is_held()


def test_a_prompt_that_is_scored_is_computed_and_not_taken_up():
    plain = submit("plain", range(16), max_tokens=2)
    scored = submit("scored", range(16), max_tokens=2, prompt_logprobs=1)
    with Bench(tokens=64, chunk=64) as bench:
        run(read_events(bench.engine, plain))
        assert run(read_events(bench.engine, scored))[0] == bench.solo_events(scored)
        assert bench.engine.stats().prefix_hits == 0
        assert run(read_events(bench.engine, submit("again", range(16), max_tokens=2)))[0]
        assert bench.engine.stats().prefix_hits == 12
    bench.assert_nothing_is_held()


def test_a_scored_prompt_that_gave_way_takes_up_what_it_has_scored():
    """Preempted by hand in the middle of its prompt: the blocks whose logits are known come back as they were."""
    with Bench(blocks=64, tokens=8, chunk=8) as bench:
        one = sequence([i % 24 for i in range(30)], prompt_logprobs=0)
        bench.scheduler.add(one)
        for _ in range(2):
            bench.engine._run(bench.scheduler.schedule())
        assert (one.computed, len(one.prompt_logprobs)) == (16, 16)
        bench.scheduler._preempt(one)
        (item,) = bench.scheduler.schedule()
        assert (one.computed, item.scores) == (16, range(16, 24))
        bench.scheduler.retire(one)


@pytest.mark.parametrize("length", [1, 2, 11])
def test_without_tokens_to_come_the_prompt_is_read_and_that_is_all(length):
    asked = submit("one", range(length), generation="a", max_tokens=0, prompt_logprobs=2)
    with Bench(ADAPTERS, tokens=8, chunk=4) as bench:
        events, last = run(read_events(bench.engine, asked))
        (told,) = events
        assert told == bench.solo_events(submit("one", range(length), generation="a", prompt_logprobs=2))[0]
        assert len(told.logprobs) == length - 1
        assert last == Finished("one", "length", length, 0)
        events, last = run(read_events(bench.engine, submit("two", range(length), max_tokens=0)))
        assert (events, last.completion_tokens) == ([], 0)
    assert bench.engine.stats().counts.generated_tokens == 0
    bench.assert_nothing_is_held()


def test_a_prompt_whose_logits_are_no_numbers_fails_alone(caplog):
    good, bad = scoring(1, 9, **SHAPED)[0], submit("bad", (4, 23, 5, 6), prompt_logprobs=1)

    async def scene(bench):
        return await asyncio.gather(
            read_events(bench.engine, good), read_events(bench.engine, bad), return_exceptions=True
        )

    with Bench(ADAPTERS) as bench:
        assert 23 not in bench.solo(good)
        bench.runner.broken.add(23)
        (events, _), error = run(scene(bench))
    assert events == bench.solo_events(good)
    assert isinstance(error, LoraplexError)
    assert "not finite" in error.message
    bench.assert_nothing_is_held()


@pytest.mark.parametrize("place", range(3))
def test_a_step_that_raises_for_one_leaves_the_others_events(place, caplog):
    asked = scoring(3, 9, **SHAPED)
    asked[place] = submit("bad", (23, 22, 21), generation="b", prompt_logprobs=1, **SHAPED)
    good = [one for one in asked if one.request_id != "bad"]

    async def scene(bench):
        return await asyncio.gather(
            *[read_events(bench.engine, one) for one in asked], return_exceptions=True
        )

    with Bench(ADAPTERS, tokens=64) as bench:
        bench.runner.poison[23] = ValueError("poison")
        found = dict(zip([one.request_id for one in asked], run(scene(bench)), strict=True))
        assert isinstance(found["bad"], LoraplexError)
        for one in good:
            assert found[one.request_id][0] == bench.solo_events(one)
    assert "ValueError: poison" in caplog.text
    bench.assert_nothing_is_held()


def test_logprobs_are_plain_data():
    (pick,) = sample(logits_for(1), [sequence(logprobs=2)])
    assert isinstance(pick.logprobs, Logprobs)
    assert {type(value) for pair in pick.logprobs.top for value in pair} == {int, float}
