"""Steps that are made while the one before runs: used when all goes on, dropped when anything happens, never wrong."""

import asyncio
import threading

import pytest
import torch

from server.engine.engine import Engine
from server.engine.sequence import Abort, Forget, Token
from server.errors import EngineDeadError
from tests.engine.fakes import BLOCK, Bench, Parts, make_adapter, read, submit

ADAPTERS = [make_adapter("a"), make_adapter("b", 20), make_adapter("c")]
PATIENCE = 30


class Stepped(Parts):
    """An engine whose steps are run one by one, here; what was drawn is read from the sequences."""

    def __init__(self, **sizes):
        super().__init__(ADAPTERS, **sizes)
        self.loader.here |= set(self.adapters)
        self.engine = Engine(self.runner, self.scheduler, max_queued=16)
        self.asked, self.found = {}, {}

    def send(self, *commands):
        for command in commands:
            if not isinstance(command, Abort | Forget):
                self.asked[command.request_id] = command
            self.engine.send(command)

    def step(self):
        """How many of the step's rows were made beforehand: all or none."""
        self.engine.take_commands(wait=False)
        before = self.runner.prepared
        self.engine.step()
        self.scheduler.check()
        self.pool.check()
        for sequence in self.scheduler.running:
            self.found[sequence.request_id] = sequence
        return self.runner.prepared - before

    def texts(self):
        """Of all sequences, run to their ends."""
        for _ in range(200):
            self.step()
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.blocks.used == 0
        return {name: found.tokens[found.prompt_length :] for name, found in self.found.items()}

    def assert_texts(self, *cut_short):
        """As if each had been alone; those that were aborted are beginnings of it."""
        texts = self.texts()
        for name, asked in self.asked.items():
            whole = self.solo(asked)
            assert texts[name] == (whole[: len(texts[name])] if name in cut_short else whole), name


def three(**given):
    return [submit(name, generation=name, max_tokens=20, **given) for name in "abc"]


def test_a_steady_decode_is_made_beforehand_from_its_first_step_on():
    bench = Stepped(blocks=64, tokens=64)
    bench.send(*three())
    assert [bench.step() for _ in range(20)] == [0] + [1] * 19
    assert bench.engine.inputs.foreseen == 19
    bench.assert_texts()


def test_an_end_that_is_known_is_foreseen():
    bench = Stepped(blocks=64, tokens=64)
    first, *others = three()
    bench.send(submit("short", generation="a", max_tokens=5), first, *others)
    assert [bench.step() for _ in range(12)] == [0] + [1] * 11
    bench.assert_texts()


def steps_around(bench, happens):
    """Whether the step after it, and the next, were made beforehand."""
    for _ in range(4):
        bench.step()
    assert bench.step() == 1
    happens()
    return bench.step(), bench.step()


def test_an_end_token_drops_the_step():
    bench = Stepped(blocks=64, tokens=64)
    whole = bench.solo(three()[0])
    end = next(token for at, token in enumerate(whole) if at >= 4 and token not in whole[:at])
    bench.send(submit("a", generation="a", max_tokens=20, stop_token_ids=frozenset({end})), *three()[1:])
    made = [bench.step() for _ in range(18)]
    assert made == [0] + [1] * whole.index(end) + [0] + [1] * (16 - whole.index(end))
    bench.assert_texts()


def test_an_abort_drops_the_step():
    bench = Stepped(blocks=64, tokens=64)
    bench.send(*three())
    assert steps_around(bench, lambda: bench.send(Abort("b"))) == (0, 1)
    bench.assert_texts("b")


def test_an_abort_and_the_same_again_drop_the_step():
    bench = Stepped(blocks=64, tokens=64)
    bench.send(*three())
    again = submit("again", generation="b", max_tokens=20)
    assert steps_around(bench, lambda: bench.send(Abort("b"), again)) == (0, 1)
    bench.assert_texts("b")


def test_an_arrival_drops_the_step():
    bench = Stepped(blocks=64, tokens=64)
    bench.send(*three())
    assert steps_around(bench, lambda: bench.send(submit("late", (9, 8, 7), max_tokens=20))) == (0, 1)
    bench.assert_texts()


def test_who_waits_for_a_seat_or_for_an_adapter_drops_nothing():
    bench = Stepped(blocks=64, tokens=64, sequences=4)
    bench.loader.here.remove("c")
    bench.send(*three()[:2])
    loading = submit("c", generation="c", max_tokens=20)
    assert steps_around(bench, lambda: bench.send(loading)) == (1, 1)
    bench.loader.end_read()
    assert bench.step() == 0
    bench.send(*[submit(f"more {i}", (i, 1), max_tokens=20) for i in range(2)])
    assert [bench.step() for _ in range(3)] == [0, 1, 1]
    assert len(bench.scheduler.waiting) == 1
    bench.assert_texts()


def test_a_name_that_takes_a_new_generation():
    """Who runs goes on with the pages of the old one, which are kept until the last of them has ended."""
    bench = Stepped(blocks=64, tokens=64, pages=4)
    bench.send(submit("old", generation="a", max_tokens=20), submit("other", generation="b", max_tokens=20))
    swap = (Forget("a"), submit("new", generation="c", max_tokens=20))
    assert steps_around(bench, lambda: bench.send(*swap)) == (0, 1)
    assert "a" in bench.pool.residents
    bench.assert_texts()
    assert "a" not in bench.pool.residents


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_foreseen_without_blocks_and_preemption_is_as_before(temperature):
    bench = Stepped(blocks=10, tokens=64)
    bench.send(*three(temperature=temperature, seed=3))
    made = [bench.step() for _ in range(20)]
    assert bench.scheduler.preemptions
    assert 0 in made[1:]
    assert made.count(1) > 5
    bench.assert_texts()


def test_blocks_taken_beforehand_are_given_back():
    bench = Stepped(blocks=64, tokens=64)
    bench.send(submit("one", range(BLOCK - 1), max_tokens=20))
    bench.step()
    bench.step()
    (sequence,) = bench.scheduler.running
    assert (sequence.computed, len(sequence.blocks)) == (BLOCK, 2), "the block of the step to come"
    bench.send(Abort("one"))
    bench.step()
    assert bench.blocks.used == 0


def test_a_step_that_raises_leaves_no_step_behind():
    bench = Stepped(blocks=64, tokens=64)
    bench.send(*three())
    for _ in range(3):
        bench.step()
    victim = bench.scheduler.running[1]
    bench.runner.poison[victim.tokens[-1]] = ValueError("poison")
    bench.step()
    bench.runner.poison.clear()
    assert victim not in bench.scheduler.running
    ended = {name for name, found in bench.found.items() if found not in bench.scheduler.running}
    bench.assert_texts(*ended)


@pytest.mark.parametrize("launches", [True, False])
def test_tokens_are_told_before_a_step_that_takes_the_host_its_time(launches):
    """And when the device is at work, where it only has to be launched."""

    async def scene(bench):
        stream = bench.engine.stream(submit("one", max_tokens=3))
        told = asyncio.create_task(anext(stream))
        await asyncio.to_thread(held.wait)
        if launches:
            await asyncio.sleep(0.05)
            assert not told.done()
            bench.runner.gate.set()
        assert isinstance(await told, Token)
        bench.runner.gate.set()
        await stream.aclose()

    with Bench(ADAPTERS) as bench:
        held, forward = threading.Event(), bench.runner.forward

        def second_is_held(inputs):
            if bench.runner.steps:
                bench.runner.gate.clear()
                held.set()
            return forward(inputs)

        bench.runner.launches, bench.runner.forward = launches, second_is_held
        asyncio.run(asyncio.wait_for(scene(bench), PATIENCE))
    bench.assert_nothing_is_held()


def test_a_fatal_error_comes_after_the_tokens_before_it():
    """They were drawn, and wait to be told when the next step is under way; the device that dies does not take them."""

    async def scene(bench, asked):
        stream = bench.engine.stream(asked)
        found = [(await anext(stream)).token_id for _ in range(5)]
        with pytest.raises(EngineDeadError):
            await anext(stream)
        return found

    asked = submit("one", max_tokens=20)
    with Bench(ADAPTERS) as bench:
        whole, forward = bench.solo(asked), bench.runner.forward

        def dies(inputs):
            if len(bench.runner.steps) == 5:
                raise torch.AcceleratorError("illegal address")
            return forward(inputs)

        bench.runner.forward = dies
        found = asyncio.run(asyncio.wait_for(scene(bench, asked), PATIENCE))
    assert found == whole[:5]


def test_streams_under_way_are_foreseen_and_read_as_if_alone():
    async def scene(bench, asked):
        return await asyncio.gather(*[read(bench.engine, one) for one in asked])

    asked = [
        submit(str(i), (i, 5, i + 1), generation=[None, "a", "b"][i % 3], max_tokens=24) for i in range(4)
    ]
    with Bench(ADAPTERS, blocks=64) as bench:
        results = asyncio.run(asyncio.wait_for(scene(bench, asked), PATIENCE))
    assert [tokens for tokens, _ in results] == [bench.solo(one) for one in asked]
    assert bench.runner.prepared >= 20
    bench.assert_nothing_is_held()
