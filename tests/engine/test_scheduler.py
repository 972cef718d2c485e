"""Who runs next: budgets, chunks, preemption, ageing, and that every sequence ends, whatever is thrown at it."""

import sys
import threading
from concurrent.futures import Future
from itertools import takewhile
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters.loader import Loader
from adapters.page_copy import copy_now
from server.engine import batch as batches
from server.engine import scheduler as module
from server.engine.engine import _keep_prompt_logprobs, _known
from server.engine.scheduler import MAX_PASSED
from tests.engine.fakes import (
    BLOCK,
    Parts,
    make_adapter,
    prompt_logprobs,
    sample,
    sequence,
    step_inputs_rows,
    submit,
)

ADAPTERS = [make_adapter("a"), make_adapter("b"), make_adapter("wide", 40), make_adapter("c", 17)]
LONGEST = 40  # tokens of prompt and output together
FEW_PASSED = 3


def scheduled(parts):
    """(name, tokens) of the next step, in order of the schedule; the tokens count as computed."""
    batch = parts.scheduler.schedule()
    parts.scheduler.check()
    parts.pool.check()
    for item in batch:
        item.sequence.computed += item.count
        if item.sequence.missing == 0:
            item.sequence.tokens.append(1)
    return [(item.sequence.request_id, item.count) for item in batch]


def add(parts, *asked):
    for one in asked:
        parts.scheduler.add(one)


def test_prompts_are_cut_at_multiples_of_the_chunk():
    parts = Parts([], tokens=20, chunk=8, sequences=8)
    add(parts, sequence(range(30), name="long"), sequence(range(50, 59), name="short"))
    assert scheduled(parts) == [("long", 16)]  # the 4 tokens left hold no whole chunk
    assert scheduled(parts) == [("long", 14)]
    assert scheduled(parts) == [("long", 1), ("short", 9)]
    assert scheduled(parts) == [("long", 1), ("short", 1)]


def foreseen(parts):
    """As `scheduled`, and the step after it is foreseen."""
    batch = parts.scheduler.schedule()
    found = [item.sequence.request_id for item in parts.scheduler.foresee(batch)]
    return scheduled(parts), found


def test_a_step_that_was_foreseen_long_ago_is_not_taken_for_the_next():
    parts = Parts([], tokens=16, chunk=8, blocks=20)
    add(parts, sequence(range(6), name="first", max_tokens=99, prompt_logprobs=0))
    assert foreseen(parts) == ([("first", 6)], ["first"])
    add(parts, sequence(range(9, 12), name="second", max_tokens=99))
    assert scheduled(parts) == [("first", 1), ("second", 3)]
    assert scheduled(parts) == [("first", 1), ("second", 1)], "as many as were running when it was foreseen"
    parts.scheduler.retire(parts.scheduler.find("second"))
    (first,) = parts.scheduler.running
    for _ in range(9):
        assert scheduled(parts) == [("first", 1)], "without a block for it"
    parts.scheduler._preempt(first)
    assert [scheduled(parts), scheduled(parts)] == [[("first", 16)], [("first", 2)]], "it begins anew"


def test_decodes_come_before_prompts():
    parts = Parts([], tokens=16, chunk=8)
    add(parts, sequence(range(16), name="first"))
    assert scheduled(parts) == [("first", 16)]
    add(parts, sequence(range(50, 74), name="second"))
    assert scheduled(parts) == [("first", 1), ("second", 8)]
    assert scheduled(parts) == [("first", 1), ("second", 8)]
    assert scheduled(parts) == [("first", 1), ("second", 8)]
    assert scheduled(parts) == [("first", 1), ("second", 1)]


def test_a_younger_decode_comes_before_an_older_prompt():
    parts = Parts([], tokens=20, chunk=8)
    add(parts, sequence(range(30), name="old"), sequence(name="young"))
    assert scheduled(parts) == [("old", 16), ("young", 3)]
    assert scheduled(parts) == [("young", 1), ("old", 14)]


def test_who_gave_way_is_first_in_the_queue():
    parts = Parts([], blocks=5, tokens=64, sequences=2)
    add(parts, *(sequence(range(at, at + 8), name=name) for at, name in enumerate(("old", "young", "later"))))
    assert scheduled(parts) == [("old", 8), ("young", 8)]
    assert scheduled(parts) == [("old", 1)]
    assert [one.request_id for one in parts.scheduler.waiting] == ["young", "later"]


def test_no_more_sequences_than_allowed():
    parts = Parts([], sequences=2, tokens=64)
    add(parts, *(sequence(name=name) for name in "abc"))
    assert scheduled(parts) == [("a", 3), ("b", 3)]
    parts.scheduler.retire(parts.scheduler.find("a"))
    assert scheduled(parts) == [("b", 1), ("c", 3)]


def test_the_youngest_gives_way_and_starts_again():
    parts = Parts([], blocks=5, tokens=64)
    add(parts, sequence(range(7), name="old"), sequence(range(1, 8), name="young"))
    assert scheduled(parts) == [("old", 7), ("young", 7)]
    assert scheduled(parts) == [("old", 1), ("young", 1)]  # both fill their second block
    assert scheduled(parts) == [("old", 1)]
    young = parts.scheduler.find("young")
    assert (young.computed, len(young.blocks), young.tokens[-2:]) == (0, 0, [1, 1])
    parts.scheduler.retire(parts.scheduler.find("old"))
    assert scheduled(parts) == [
        ("young", 5)
    ]  # its first block was still there; the old one has taken the second


def test_an_older_prompts_blocks_are_its_own():
    """A decode that finds no block gives way itself rather than take those of an older prompt."""
    parts = Parts([], blocks=8, tokens=12, chunk=4)
    add(parts, sequence(range(4), name="decode"), sequence(range(1, 25), name="prompt"))
    assert scheduled(parts) == [("decode", 4), ("prompt", 8)]
    assert parts.blocks.free == 0
    assert scheduled(parts) == [("decode", 1)]  # takes the prompt's, which is younger
    assert not parts.scheduler.find("prompt").blocks


def test_an_adapter_on_its_way_stops_nobody():
    parts = Parts(ADAPTERS, tokens=64)
    add(parts, sequence(generation="a", name="waits"), sequence(name="base"))
    assert scheduled(parts) == [("base", 3)]
    parts.loader.end_read()
    assert scheduled(parts) == [("base", 1), ("waits", 3)]


def test_the_time_in_the_queue_ends_with_the_first_admission():
    parts = Parts(ADAPTERS, blocks=5, tokens=64)
    waits = sequence(range(7), generation="a", name="waits")
    add(parts, waits)
    with patch("server.engine.scheduler.time.perf_counter", lambda: waits.arrived + 2):
        scheduled(parts)
        assert waits.queued == 0, "its adapter is being read"
        parts.loader.end_read()
        scheduled(parts)
        assert waits.queued == 2
    parts.scheduler._preempt(waits)
    scheduled(parts)
    assert (waits.queued, len(parts.scheduler.running)) == (2, 1)
    assert (parts.residency.hits, parts.residency.misses) == (1, 1)


def test_an_adapter_that_cannot_be_read_is_rejected_alone():
    parts = Parts(ADAPTERS, tokens=64)
    add(parts, sequence(generation="a", name="bad"), sequence(name="base"))
    scheduled(parts)
    parts.loader.end_read(well=False)
    assert scheduled(parts) == [("base", 1)]
    ((rejected, error),) = parts.scheduler.rejected
    assert (rejected.request_id, error.code) == ("bad", "adapter_load_failed")
    assert parts.scheduler.find("bad") is None


def test_who_finds_no_room_is_passed_a_bounded_number_of_times():
    parts = Parts(ADAPTERS, pages=4, sequences=2, tokens=64)
    parts.loader.here |= set(parts.adapters)
    add(parts, sequence(generation="c", name="holder"))  # 2 of 4 pages, so that "wide" with 3 finds no room
    scheduled(parts)
    wide = sequence(generation="wide", name="wide")
    add(parts, wide, *(sequence(name=f"young {i}") for i in range(MAX_PASSED + 5)))
    for i in range(MAX_PASSED):
        assert scheduled(parts) == [("holder", 1), (f"young {i}", 3)]
        assert wide.passed == i + 1
        parts.scheduler.retire(parts.scheduler.find(f"young {i}"))
        holder = parts.scheduler.find("holder")
        del holder.tokens[3:]
        holder.computed = 2
    assert scheduled(parts) == [("holder", 1)], "nobody passes it any more"
    parts.scheduler.retire(parts.scheduler.find("holder"))
    assert scheduled(parts)[0] == ("wide", 3)


def calls_of(function):
    """How many calls of any function it takes."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def full_pool(waiting, *, host):
    """Parts whose pages are all held, `waiting` sequences with adapters of their own, and room on the host for some."""
    adapters = [make_adapter(str(i)) for i in range(waiting + 1)]
    here, read = {adapter.generation: adapter for adapter in adapters}, threading.Semaphore(0)
    loader = Loader(here.get, adapters[0].nbytes * host, read.release, threads=1)
    parts = Parts(adapters, pages=1, sequences=8, tokens=64, blocks=512, loader=loader)
    add(parts, *(sequence(generation=a.generation, name=a.generation, max_tokens=99) for a in adapters))
    scheduled(parts)
    for _ in adapters:
        assert read.acquire(timeout=10)
    for _ in range(5):
        scheduled(parts)
        while read.acquire(timeout=0.05):
            pass
    assert (len(parts.scheduler.running), len(parts.scheduler.waiting)) == (1, waiting)
    return parts


@pytest.mark.parametrize("host", [10, 1000])
def test_a_long_queue_at_a_full_pool_costs_a_step_as_much_by_the_head(host):
    costs = []
    for waiting in (50, 100, 150):
        parts = full_pool(waiting, host=host)
        costs.append(calls_of(parts.scheduler.schedule))
        parts.loader.close()
    first, second = costs[1] - costs[0], costs[2] - costs[1]
    assert second <= 1.05 * first, costs


def test_who_finds_no_pages_is_asked_again_when_some_were_let_go():
    parts = Parts(ADAPTERS, pages=3, sequences=8, tokens=64)
    parts.loader.here |= set(parts.adapters)
    add(parts, *(sequence(generation=g, name=g, max_tokens=99) for g in ("wide", "a", "b", "c")))
    with patch.object(parts.pool, "admit", wraps=parts.pool.admit) as admit:
        assert [scheduled(parts), scheduled(parts)] == [[("wide", 3)], [("wide", 1)]]
        asked = admit.call_count
        for _ in range(3):
            assert scheduled(parts) == [("wide", 1)]
        assert admit.call_count == asked, "nothing has changed"
        parts.scheduler.retire(parts.scheduler.find("wide"))
        assert scheduled(parts) == [("a", 3), ("b", 3)]
        assert admit.call_count == asked + 3


def test_who_finds_no_pages_is_asked_again_when_a_copy_has_ended():
    parts, copies = Parts(ADAPTERS, pages=3, sequences=8, tokens=64), []
    parts.loader.here |= set(parts.adapters)
    parts.pool.copy = lambda asked: copies.append((asked, Future())) or copies[-1][1]
    add(parts, *(sequence(generation=g, name=g, max_tokens=99) for g in ("wide", "b")))
    assert scheduled(parts) == [], "one is on its way, and the other finds no pages"
    parts.scheduler.retire(parts.scheduler.find("wide"))
    assert scheduled(parts) == []
    copies[0][1].set_result(copy_now(copies[0][0]).result())
    assert scheduled(parts) == []
    assert len(copies) == 2, "pages that were written for nobody were not given to another"
    copies[1][1].set_result(copy_now(copies[1][0]).result())
    assert scheduled(parts) == [("b", 3)]


def test_who_finds_no_pages_is_asked_again_though_the_pool_looks_as_before():
    """Pages that were taken and let go between two looks leave no trace in how many are held."""
    parts, copies = Parts(ADAPTERS, pages=3, sequences=8, tokens=64), []
    parts.loader.here |= set(parts.adapters)
    parts.pool.copy = lambda asked: copies.append((asked, Future())) or copies[-1][1]
    add(parts, *(sequence(generation=g, name=g, max_tokens=99) for g in ("wide", "b")))
    assert scheduled(parts) == []
    parts.scheduler.retire(parts.scheduler.find("wide"))
    copies[0][1].set_result(copy_now(copies[0][0]).result())
    parts.pool.forget("wide")
    assert parts.pool.used == 0
    scheduled(parts)
    assert len(copies) == 2, "who was refused once is refused for ever"


def test_one_that_was_passed_and_must_be_read_again_goes_on_ageing():
    """The host cache may lose what it read while a sequence finds no room: that must not start its count anew."""
    parts = Parts(ADAPTERS, pages=4, sequences=2, tokens=64)
    parts.loader.here |= set(parts.adapters)
    add(parts, sequence(generation="c", name="holder", max_tokens=99))
    scheduled(parts)
    add(parts, sequence(generation="wide", name="wide"))
    passed = 0
    for i in range(MAX_PASSED + 5):
        add(parts, sequence(name=f"young {i}"))
        started = [name for name, _ in scheduled(parts) if name.startswith("young")]
        for name in started:
            parts.scheduler.retire(parts.scheduler.find(name))
        passed += len(started)
        parts.loader.here.discard("wide")
    assert passed == MAX_PASSED


def test_the_loader_hears_who_waits_in_order():
    parts = Parts(ADAPTERS, pages=4, sequences=1, tokens=64)
    parts.loader.here.add("a")
    add(
        parts,
        *(sequence(generation=g, name=f"{i}") for i, g in enumerate(["a", "c", None, "wide", "c", "a"])),
    )
    scheduled(parts)
    assert parts.loader.line == ["a", "c", "wide", "c", "a"]
    scheduled(parts)
    assert parts.loader.line == ["c", "wide", "c"], "one that is on the device needs no host memory"


def test_the_first_few_are_read_while_all_seats_are_taken():
    parts = Parts([make_adapter(str(i)) for i in range(9)], sequences=1, tokens=64)
    add(parts, sequence(name="sits", max_tokens=99))
    add(parts, *(sequence(generation=str(i), name=str(i)) for i in range(9)))
    assert scheduled(parts) == [("sits", 3)]
    assert parts.loader.reading == ["0", "1", "2", "3"]
    parts.loader.end_read(well=False)
    assert scheduled(parts) == [("sits", 1)]
    assert not parts.scheduler.rejected, "told when it is its turn"
    parts.scheduler.retire(parts.scheduler.find("sits"))
    scheduled(parts)
    assert [one.request_id for one, _ in parts.scheduler.rejected] == ["0"]


def test_many_adapters_share_a_host_cache_that_holds_one():
    """Waiting for pages, they do not put each other out of host memory: each is read a few times, not at every step."""
    adapters, reads, done = [make_adapter(str(i)) for i in range(5)], [], threading.Semaphore(0)
    by_name = {adapter.generation: adapter for adapter in adapters}

    def read(generation):
        reads.append(generation)
        return by_name[generation]

    loader = Loader(read, adapters[0].nbytes, done.release, threads=1)
    parts = Parts(adapters, pages=1, sequences=8, tokens=64, loader=loader)
    add(parts, *(sequence(generation=a.generation, name=a.generation, max_tokens=4) for a in adapters))
    for _ in range(200):
        scheduled(parts)
        done.acquire(timeout=0.02)
        loader.check()
        for one in [one for one in parts.scheduler.running if one.output_length == 4]:
            parts.scheduler.retire(one)
        if not parts.scheduler.running and not parts.scheduler.waiting:
            break
    loader.close()
    assert not parts.scheduler.waiting
    assert len(reads) <= 2 * len(adapters), reads


def test_too_few_blocks_for_the_oldest_age_it_too():
    parts = Parts([], blocks=6, tokens=64)
    add(parts, sequence(range(8), name="holder"))
    scheduled(parts)
    add(parts, sequence(range(16), name="long"), sequence(name="short"))
    assert scheduled(parts) == [("holder", 1), ("short", 3)]
    assert parts.scheduler.find("long").passed == 1


def test_retiring_gives_everything_back():
    parts = Parts(ADAPTERS, tokens=64)
    parts.loader.here.add("a")
    add(parts, sequence(generation="a", name="runs"))
    scheduled(parts)
    add(parts, sequence(name="waits"))
    for name in ("runs", "waits"):
        parts.scheduler.retire(parts.scheduler.find(name))
    assert parts.blocks.used == 0
    parts.pool.forget("a")
    assert parts.pool.used == 0, "still pinned"
    assert parts.scheduler.find("runs") is parts.scheduler.find("waits") is None


@pytest.mark.parametrize("budget", [8, 9, 15, 16, 40])
def test_the_budget_is_never_passed(budget):
    parts = Parts([], tokens=budget, chunk=8, sequences=6, blocks=64)
    add(parts, *(sequence(range(5 + 4 * i), name=str(i)) for i in range(6)))
    for _ in range(60):
        assert sum(count for _, count in scheduled(parts)) <= budget
        for done in [one for one in parts.scheduler.running if one.output_length == 4]:
            parts.scheduler.retire(done)
    assert not parts.scheduler.waiting


def assert_same_inputs(got, want):
    """Whether a step was made beforehand or not, it reads and writes the same."""
    assert step_inputs_rows(got).tolist() == step_inputs_rows(want).tolist()
    assert got.logits_rows.tolist() == want.logits_rows.tolist()
    assert got.spans.table.tolist() == want.spans.table.tolist()
    assert got.spans.blocks.tolist() == want.spans.blocks.tolist()
    assert got.segments == want.segments


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, aborts and reads, over the fake runner: tokens must be those of each sequence alone."""

    def __init__(self):
        super().__init__()
        self.patch = patch.object(module, "MAX_PASSED", FEW_PASSED)
        self.patch.start()
        self.count = 0
        self.open = {}  # request id -> its submit
        self.passed = {}  # request id -> younger ones admitted since it was first passed with its adapter at hand

    @initialize(blocks=st.integers(11, 24), tokens=st.integers(8, 30), sequences=st.integers(1, 5))
    def build(self, blocks, tokens, sequences):
        self.parts = Parts(ADAPTERS, blocks=blocks, pages=3, tokens=tokens, chunk=8, sequences=sequences)
        self.inputs = batches.Inputs(self.parts.runner, self.parts.scheduler)
        self.foresees = True

    @rule(
        beginning=st.integers(0, 5),
        prompt=st.integers(1, LONGEST - 8),
        max_tokens=st.integers(1, 8),
        generation=st.sampled_from([None, "a", "b", "c", "wide"]),
        temperature=st.sampled_from([0.0, 1.0]),
        penalty=st.sampled_from([1.0, 1.3]),
        scored=st.sampled_from([None, None, 1]),
        stops=st.sampled_from([frozenset(), frozenset(range(8))]),
    )
    def submit(self, beginning, prompt, max_tokens, generation, temperature, penalty, scored, stops):
        name, self.count = str(self.count), self.count + 1
        text = [(beginning * 7 + i) % 24 for i in range(prompt)]
        asked = submit(
            name, text, generation=generation, max_tokens=max_tokens, temperature=temperature, seed=self.count,
            repetition_penalty=penalty, prompt_logprobs=scored, stop_token_ids=stops,
        )  # fmt: skip
        self.open[name], self.passed[name] = asked, 0
        self.parts.scheduler.add(module.Sequence.of(asked))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0))
    def abort(self, which):
        name = list(self.open)[which % len(self.open)]
        del self.open[name]
        self.parts.scheduler.retire(self.parts.scheduler.find(name))

    @precondition(lambda self: self.parts.loader.reading)
    @rule(well=st.sampled_from([True, True, True, False]))
    def end_read(self, well):
        self.parts.loader.end_read(well=well)

    @precondition(lambda self: self.parts.loader.here)
    @rule(which=st.integers(0))
    def lose(self, which):
        """The host cache puts one out."""
        self.parts.loader.here.remove(sorted(self.parts.loader.here)[which % len(self.parts.loader.here)])

    @rule(generation=st.sampled_from(["a", "b", "c", "wide"]))
    def forget(self, generation):
        """Its name has moved on; whoever asks for it again has it read again."""
        self.parts.pool.forget(generation)
        self.parts.loader.here.discard(generation)

    @rule(steps=st.integers(1, 4), foresees=st.sampled_from([True, True, True, False]))
    def run(self, steps, foresees):
        self.foresees = foresees
        for _ in range(steps):
            self.step()

    def step(self):
        scheduler, limits = self.parts.scheduler, self.parts.scheduler.limits
        running = {s.request_id for s in scheduler.running}
        queue = list(scheduler.waiting)
        batch = batches.in_row_order(scheduler.schedule())
        self.books_agree()
        assert len({item.sequence for item in batch}) == len(batch)
        assert sum(item.count for item in batch) <= limits.tokens
        assert bool(batch) == bool(scheduler.running), "something could run and did not"
        for item in batch:
            end = item.sequence.computed + item.count
            assert item.count > 0
            assert item.samples or end % limits.prefill_chunk == 0
        for sequence_, error in scheduler.rejected:
            assert error.code == "adapter_load_failed"
            del self.open[sequence_.request_id]
        scheduler.rejected.clear()
        self._note_passed(queue, running)
        if batch:
            self._forward(batch)

    def _note_passed(self, queue, running):
        """One that has been passed with its adapter at hand is passed a few times in all, whatever happens then."""
        started = {s.request_id for s in self.parts.scheduler.running} - running
        for place, older in enumerate(queue):
            passed = self.passed[older.request_id]
            counts = passed or (self._at_hand(older.generation) and not self._follows(older))
            if older in self.parts.scheduler.waiting and counts:
                younger = {s.request_id for s in queue[place + 1 :]}
                self.passed[older.request_id] = passed = passed + len(younger & started)
                assert passed <= FEW_PASSED, "starved"

    def _at_hand(self, generation):
        return generation is None or generation in self.parts.loader.here

    def _follows(self, waiting):
        """Whether a running sequence is computing a block that this one would begin with."""
        for one in self.parts.scheduler.running:
            pairs = zip(one.tokens, waiting.tokens, strict=False)
            alike = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            if one.generation == waiting.generation and one.computed < alike // BLOCK * BLOCK:
                return True
        return False

    def _forward(self, batch):
        inputs = self.inputs.of(batch)
        assert_same_inputs(inputs, batches.build(batch, self.parts.residency, BLOCK))
        logits = self.parts.runner.forward(inputs)
        if self.foresees:
            self.inputs.foresee(batch, inputs)
            self.books_agree()
        drawing = [item.sequence for item in batch if item.samples]
        picks = sample(logits, drawing, _known(batch))
        _keep_prompt_logprobs(batch, picks[len(drawing) :])
        for item in batch:
            item.sequence.computed += item.count
        for one, pick in zip(drawing, picks, strict=False):
            one.tokens.append(pick.token_id)
            if one.finish_reason():
                asked = self.open.pop(one.request_id)
                assert one.tokens[one.prompt_length :] == self.parts.solo(asked)
                if asked.sampling.prompt_logprobs is not None:
                    assert one.prompt_logprobs == list(
                        prompt_logprobs(asked, self.parts.mark(asked.generation))
                    )
                self.parts.scheduler.retire(one)

    @invariant()
    def books_agree(self):
        if hasattr(self, "parts"):
            self.parts.scheduler.check()
            self.parts.pool.check()
            self.parts.loader.check()
            held = {s.request_id for s in (*self.parts.scheduler.running, *self.parts.scheduler.waiting)}
            held |= {s.request_id for s, _ in self.parts.scheduler.rejected}
            assert held == set(self.open)

    def teardown(self):
        try:
            if hasattr(self, "parts"):
                self.run_to_the_end()
        finally:
            self.patch.stop()

    def run_to_the_end(self):
        for _ in range(200 + 60 * len(self.open)):
            if not self.open:
                break
            while self.parts.loader.reading:
                self.parts.loader.end_read()
            self.step()
        assert not self.open, "sequences that never end"
        assert self.parts.blocks.used == 0
        for generation in self.parts.pool.residents:
            self.parts.pool.forget(generation)
        assert self.parts.pool.used == 0


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def test_an_adapter_on_its_way_to_the_device_is_waited_for_and_counted_once():
    parts = Parts([make_adapter("a")])
    parts.loader.here.add("a")
    copies = []

    def copy(asked):
        copies.append((asked, Future()))
        return copies[0][1]

    parts.pool.copy = copy
    parts.scheduler.add(sequence(generation="a"))
    assert parts.scheduler.schedule() == []
    assert parts.scheduler.schedule() == []
    assert len(copies) == 1, "an adapter on its way was sent again"
    asked, future = copies[0]
    future.set_result(copy_now(asked).result())
    assert len(parts.scheduler.schedule()) == 1
    parts.scheduler.add(sequence(generation="a", name="second"))
    assert len(parts.scheduler.schedule()) == 2
    assert (parts.residency.misses, parts.residency.hits) == (1, 1)
