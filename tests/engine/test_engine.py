"""The engine end to end with real threads: streams, aborts, failures that stay where they are, and its end."""

import asyncio

import pytest
import torch

from server.engine.sequence import Finished, Token
from server.errors import AdapterRejectedError, EngineDeadError, LoraplexError, QueueFullError
from tests.engine.fakes import Bench, make_adapter, read, submit

ADAPTERS = [make_adapter("a"), make_adapter("b", 20), make_adapter("c")]
PATIENCE = 30  # seconds until a test that hangs is called failed


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


async def read_all(engine, asked):
    return await asyncio.gather(*[read(engine, one) for one in asked], return_exceptions=True)


async def started(engine, asked):
    """A stream that has given its first token."""
    stream = engine.stream(asked)
    first = await anext(stream)
    assert isinstance(first, Token)
    return stream


async def until(condition):
    """Let other coroutines and the engine go on until `condition`; the patience of `run` ends it."""
    while not condition():
        await asyncio.sleep(0.001)


def test_a_stream_is_its_tokens_and_then_its_end():
    with Bench(ADAPTERS) as bench:
        asked = submit("one", generation="a", max_tokens=5)
        tokens, last = run(read(bench.engine, asked))
    assert tokens == bench.solo(asked)
    assert last == Finished("one", "length", 3, 5)
    bench.assert_nothing_is_held()


def test_an_adapter_and_the_base_say_different_things():
    with Bench(ADAPTERS) as bench:
        asked = [submit(str(name), generation=name, max_tokens=8) for name in (None, "a", "b")]
        texts = [tuple(tokens) for tokens, _ in run(read_all(bench.engine, asked))]
    assert len(set(texts)) == 3


def test_an_end_token_stops_and_is_told():
    asked = submit("one", max_tokens=6)
    with Bench() as bench:
        end = bench.solo(asked)[2]
        stopping = submit("two", max_tokens=6, stop_token_ids=frozenset({end}))
        tokens, last = run(read(bench.engine, stopping))
    assert tokens == bench.solo(stopping)
    assert (tokens[-1], last.reason, last.completion_tokens) == (end, "stop", len(tokens))


def test_many_streams_at_once_each_as_if_alone():
    asked = [
        submit(str(i), range(i % 5, 8 + 2 * i), generation=[None, "a", "b", "c"][i % 4], max_tokens=1 + i % 7,
               temperature=i % 2, seed=i)
        for i in range(14)
    ]  # fmt: skip
    with Bench(ADAPTERS, blocks=30) as bench:
        results = run(read_all(bench.engine, asked))
    assert [tokens for tokens, _ in results] == [bench.solo(one) for one in asked]
    stats = bench.engine.stats()
    assert stats.counts.prefill_tokens + stats.counts.decode_tokens >= sum(len(one.prompt) for one in asked)
    bench.assert_nothing_is_held()


def test_preempted_streams_lose_nothing():
    asked = [submit(str(i), range(i, i + 8), max_tokens=12, temperature=1.0, seed=i) for i in range(4)]
    with Bench(blocks=9, tokens=64) as bench:
        results = run(read_all(bench.engine, asked))
    assert [tokens for tokens, _ in results] == [bench.solo(one) for one in asked]
    computed = sum(len(step.token_ids) for step in bench.runner.steps)
    assert computed > 4 * (8 + 11), "nothing was computed twice: the blocks were enough"
    bench.assert_nothing_is_held()


def test_more_adapters_than_pages_take_turns():
    asked = [submit(str(i), generation="abc"[i % 3], max_tokens=4) for i in range(9)]
    with Bench(ADAPTERS, pages=2) as bench:
        results = run(read_all(bench.engine, asked))
    assert [tokens for tokens, _ in results] == [bench.solo(one) for one in asked]
    assert bench.engine.stats().adapter_evictions > 0
    bench.assert_nothing_is_held()


def test_closing_early_aborts():
    async def scene(bench):
        stream = await started(bench.engine, submit("gone", generation="a", max_tokens=90))
        assert bench.engine.stats().running == 1
        await stream.aclose()
        await until(lambda: bench.engine.stats().running == 0)
        assert bench.engine.stats().kv_blocks_used == 0

    with Bench(ADAPTERS, blocks=64) as bench:
        run(scene(bench))
    bench.assert_nothing_is_held()


def test_a_reader_that_is_cancelled_aborts():
    async def scene(bench):
        reader = asyncio.create_task(read(bench.engine, submit("gone", max_tokens=90)))
        await until(lambda: bench.engine.stats().running == 1)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await until(lambda: bench.engine.stats().running == 0)

    with Bench(blocks=64) as bench:
        run(scene(bench))
    bench.assert_nothing_is_held()


def test_aborting_one_that_waits():
    async def scene(bench):
        bench.runner.gate.clear()
        running = asyncio.create_task(read(bench.engine, submit("runs")))
        await asyncio.to_thread(bench.runner.entered.wait)
        waiting = asyncio.create_task(read(bench.engine, submit("waits")))
        await until(lambda: bench.engine.stats().waiting == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        bench.runner.gate.set()
        tokens, _ = await running
        assert tokens == bench.solo(submit("runs"))

    with Bench(sequences=1) as bench:
        run(scene(bench))
    assert all(len(step.spans) == 1 for step in bench.runner.steps)
    bench.assert_nothing_is_held()


@pytest.mark.parametrize("place", range(4))
def test_a_sequence_that_raises_fails_alone(place, caplog):
    asked = [submit(str(i), (i, 9, 10 + i), generation=[None, "a"][i % 2], max_tokens=5) for i in range(4)]
    asked[place] = submit("bad", (23, 22, 21), generation="b", max_tokens=5)
    with Bench(ADAPTERS, tokens=64) as bench:
        good = [one for one in asked if one.request_id != "bad"]
        clean = [one for one in good if 23 not in bench.solo(one)]
        assert clean
        bench.runner.poison[23] = ValueError("poison")
        results = dict(
            zip([one.request_id for one in asked], run(read_all(bench.engine, asked)), strict=True)
        )
        assert isinstance(results["bad"], LoraplexError)
        assert "poison" not in results["bad"].message
        assert "ValueError: poison" in caplog.text
        for one in clean:
            assert results[one.request_id][0] == bench.solo(one)
        assert bench.engine.healthy
        assert run(read(bench.engine, clean[0]))[0] == bench.solo(clean[0])
    bench.assert_nothing_is_held()


def test_a_sequence_whose_logits_are_no_numbers_fails_alone():
    good, bad = submit("good", (1, 2)), submit("bad", (23, 2), temperature=1.0)
    with Bench() as bench:
        assert 23 not in bench.solo(good)
        bench.runner.broken.add(23)
        results = run(read_all(bench.engine, [good, bad]))
    assert results[0][0] == bench.solo(good)
    assert isinstance(results[1], LoraplexError)
    assert "not finite" in results[1].message
    bench.assert_nothing_is_held()


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("illegal address"), SystemExit("out")], ids=["device", "exit"]
)
def test_a_fatal_error_ends_every_stream_and_the_engine(error, caplog):
    with Bench(blocks=64) as bench:
        assert bench.engine.healthy
        bench.runner.poison[23] = error
        asked = [submit("good", (1, 2), max_tokens=90), submit("bad", (23,))]
        results = run(read_all(bench.engine, asked))
        assert [type(result) for result in results] == [EngineDeadError, EngineDeadError]
        assert not bench.engine.healthy
        with pytest.raises(EngineDeadError):
            run(read(bench.engine, submit("late")))
        assert len(bench.engine._streams) == 0
    assert "the engine stopped on an error" in caplog.text


def test_stop_ends_streams_with_an_error():
    async def scene(bench):
        stream = await started(bench.engine, submit("cut", max_tokens=900))
        waiting = asyncio.create_task(read(bench.engine, submit("waits")))
        await until(lambda: bench.engine.stats().waiting == 1)
        await asyncio.to_thread(bench.engine.stop, PATIENCE)
        assert not bench.engine.healthy
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
        with pytest.raises(EngineDeadError):
            await waiting
        with pytest.raises(EngineDeadError):
            await read(bench.engine, submit("late"))

    with Bench(blocks=512, sequences=1) as bench:
        run(scene(bench))


def test_a_full_queue_refuses_at_once():
    async def scene(bench):
        bench.runner.gate.clear()
        readers = [asyncio.create_task(read(bench.engine, submit(str(i)))) for i in range(3)]
        await until(lambda: len(bench.engine._streams) == 3)
        with pytest.raises(QueueFullError, match="3 sequences"):
            await read(bench.engine, submit("one too many"))
        bench.runner.gate.set()
        await asyncio.gather(*readers)
        tokens, _ = await read(bench.engine, submit("later"))
        assert tokens == bench.solo(submit("later"))

    with Bench(sequences=1, max_queued=2) as bench:
        run(scene(bench))
    bench.assert_nothing_is_held()


def test_a_stream_that_has_ended_and_is_not_read_holds_no_place():
    async def scene(bench):
        ended = [await started(bench.engine, submit(str(i), max_tokens=2)) for i in range(3)]
        await until(lambda: bench.engine.stats().running == len(bench.engine._streams) == 0)
        assert bench.engine.stats().waiting == 0
        tokens, _ = await read(bench.engine, submit("later"))
        assert tokens == bench.solo(submit("later"))
        for i, stream in enumerate(ended):
            rest = [event async for event in stream]
            assert [event.token_id for event in rest[:-1]] == bench.solo(submit(str(i), max_tokens=2))[1:]
            assert rest[-1] == Finished(str(i), "length", 3, 2)

    with Bench(sequences=1, max_queued=2) as bench:
        run(scene(bench))
    bench.assert_nothing_is_held()


def test_answers_that_nobody_reads_have_a_bound():
    async def scene(bench):
        ended = [await started(bench.engine, submit(str(i), max_tokens=2)) for i in range(2)]
        while len(ended) < 4 * bench.engine.max_open:
            await until(lambda: len(bench.engine._streams) == 0)
            ended.append(await started(bench.engine, submit(str(len(ended)), max_tokens=2)))
        await until(lambda: len(bench.engine._streams) == 0)
        with pytest.raises(QueueFullError, match="12 answers are not read"):
            await read(bench.engine, submit("one more"))
        await ended.pop().aclose()
        assert (await read(bench.engine, submit("one more")))[0] == bench.solo(submit("one more"))
        for stream in ended:
            await stream.aclose()

    with Bench(sequences=1, max_queued=2) as bench:
        run(scene(bench))
    bench.assert_nothing_is_held()


def test_an_ended_stream_whose_reader_leaves_is_forgotten():
    async def scene(bench):
        stream = await started(bench.engine, submit("gone", max_tokens=2))
        await until(lambda: len(bench.engine._streams) == 0)
        await stream.aclose()
        assert (await read(bench.engine, submit("gone")))[0] == bench.solo(submit("gone"))

    with Bench() as bench:
        run(scene(bench))
    bench.assert_nothing_is_held()


def test_an_adapter_that_cannot_be_read_fails_its_sequences_alone():
    asked = [submit("bad", generation="a"), submit("good", generation="b"), submit("base")]
    with Bench(ADAPTERS) as bench:
        bench.unreadable.add("a")
        bad, *good = run(read_all(bench.engine, asked))
        assert isinstance(bad, AdapterRejectedError)
        assert (bad.code, bad.param, bad.http_status) == ("adapter_load_failed", "adapter", 500)
        assert [tokens for tokens, _ in good] == [bench.solo(one) for one in asked[1:]]
        bench.unreadable.clear()
        assert run(read(bench.engine, asked[0]))[0] == bench.solo(asked[0]), "the next request reads again"
    bench.assert_nothing_is_held()


def test_forgetting_frees_pages_once_nobody_reads_them():
    async def scene(bench):
        stream = await started(bench.engine, submit("reads", generation="a", max_tokens=40))
        bench.engine.forget("a")
        tokens = [event.token_id async for event in stream if isinstance(event, Token)]
        assert tokens == bench.solo(submit("reads", generation="a", max_tokens=40))[1:]
        await until(lambda: bench.engine.stats().pages_used == 0)
        await read(bench.engine, submit("again", generation="a"))
        assert bench.engine.stats().resident == ("a",)
        bench.engine.forget("a")
        await until(lambda: bench.engine.stats().resident == ())

    with Bench(ADAPTERS, blocks=64) as bench:
        run(scene(bench))
    bench.assert_nothing_is_held()


def test_stats_count_what_was_done():
    with Bench(ADAPTERS, tokens=64, blocks=20, pages=5) as bench:
        run(read(bench.engine, submit("one", range(6), generation="b", max_tokens=4)))
        run(read(bench.engine, submit("two", range(3), max_tokens=1)))
    stats = bench.engine.stats()
    counts = stats.counts
    assert (counts.steps, counts.prefill_steps, counts.prefill_tokens, counts.decode_tokens) == (5, 2, 9, 3)
    assert (counts.generated_tokens, counts.last_sequences, counts.last_adapters) == (5, 1, 0)
    assert 0 < counts.prefill_seconds < counts.seconds
    assert (stats.running, stats.waiting) == (0, 0)
    assert (stats.kv_blocks_used, stats.kv_blocks_total) == (0, 19)
    assert (stats.pages_used, stats.pages_total, stats.adapter_room) == (2, 10, 5)
    assert stats.resident == ("b",)
    assert (stats.adapter_copies.count, stats.adapter_evictions) == (1, 0)
    assert (stats.adapter_hits, stats.adapter_misses, stats.waiting_for) == (0, 1, ())
    assert stats.kv_block_size == 4


def rows(bench):
    return sum(len(step.token_ids) for step in bench.runner.steps)


def test_the_one_token_that_a_cached_prompt_lacks_is_a_prompt_token():
    with Bench(tokens=64) as bench:
        for name in ("first", "again"):
            run(read(bench.engine, submit(name, range(9), max_tokens=3)))
    stats, counts = bench.engine.stats(), bench.engine.stats().counts
    assert (counts.steps, counts.prefill_steps, counts.prefill_tokens, counts.decode_tokens) == (6, 2, 10, 4)
    assert (stats.prefix_tokens, stats.prefix_hits) == (18, 8)
    assert counts.prefill_tokens + counts.decode_tokens == rows(bench)


def test_a_preemption_makes_no_new_prompt_of_what_was_generated():
    asked = [submit(str(i), range(i, i + 8), max_tokens=12, temperature=1.0, seed=i) for i in range(4)]
    with Bench(blocks=9, tokens=64) as bench:
        run(read_all(bench.engine, asked))
    stats, counts = bench.engine.stats(), bench.engine.stats().counts
    assert stats.preemptions > 0
    assert (stats.prefix_tokens, stats.prefix_hits) == (4 * 8, 0)
    assert counts.generated_tokens == 4 * 12
    assert counts.prefill_tokens + counts.decode_tokens == rows(bench)
    prompt_rows = sum(int((step.positions < 8).sum()) for step in bench.runner.steps)
    assert counts.prefill_tokens == prompt_rows


def test_what_a_step_that_raised_did_not_compute_is_not_counted():
    asked = [submit("good", (1, 2, 3), max_tokens=1), submit("bad", (23, 22, 21), max_tokens=1)]
    with Bench(tokens=64) as bench:
        bench.runner.poison[23] = ValueError("poison")
        run(read_all(bench.engine, asked))
    counts = bench.engine.stats().counts
    assert (counts.prefill_tokens, counts.decode_tokens, counts.generated_tokens) == (3, 0, 1)


def test_an_idle_engine_does_not_step():
    with Bench() as bench:
        run(read(bench.engine, submit("one")))
        before = bench.engine.stats().counts.steps
        bench.engine.wake()
        bench.engine.forget("nobody")
        run(read(bench.engine, submit("two", max_tokens=2)))
    assert bench.engine.stats().counts.steps == before + 2


def test_streams_of_several_event_loops():
    with Bench() as bench:
        for name in ("first", "second"):
            assert run(read(bench.engine, submit(name)))[0] == bench.solo(submit(name))
    bench.assert_nothing_is_held()


def test_a_request_id_is_used_once_at_a_time():
    async def scene(bench):
        stream = await started(bench.engine, submit("same", max_tokens=90))
        with pytest.raises(AssertionError, match="in use"):
            await read(bench.engine, submit("same"))
        await stream.aclose()

    with Bench(blocks=64) as bench:
        run(scene(bench))
    bench.assert_nothing_is_held()
