"""The loader: one read at a time per generation, a strict bound, errors told once."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters.adapter import Adapter, Delta
from adapters.errors import AdapterError
from adapters.loader import READ_AHEAD, Loader

WAIT = 10.0


def sized(generation: str, nbytes: int) -> Adapter:
    half = nbytes // 8
    return Adapter(generation, (Delta(0, 0, torch.zeros(1, half), torch.zeros(1, half), 1.0),))


class Reads:
    """A reader whose reads end when told to."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.calls: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.ready = threading.Semaphore(0)

    def __call__(self, generation: str) -> Adapter:
        self.calls.append(generation)
        assert self.gate.wait(WAIT)
        if generation in self.failing:
            raise self.failing[generation]
        return sized(generation, self.sizes[generation])


@pytest.fixture
def reads():
    return Reads({"a": 400, "b": 400, "c": 400, "large": 4000})


@pytest.fixture
def loader(reads):
    loader = Loader(reads, max_bytes=800, on_ready=reads.ready.release)
    yield loader
    loader.close()


def fetch(loader: Loader, reads: Reads, generation: str) -> Adapter:
    adapter = loader.get(generation)
    if adapter is None:
        assert reads.ready.acquire(timeout=WAIT)
        adapter = loader.get(generation)
    assert adapter is not None
    return adapter


def test_get_never_waits_and_one_read_serves_all(loader, reads):
    reads.gate.clear()
    assert [loader.get("a") for _ in range(5)] == [None] * 5
    reads.gate.set()
    assert reads.ready.acquire(timeout=WAIT)
    assert loader.get("a").generation == "a"
    assert reads.calls == ["a"]
    assert loader.load_seconds.count == 1
    loader.check()


def test_many_threads_start_one_read(loader, reads):
    reads.gate.clear()
    threads = [threading.Thread(target=loader.get, args=("a",)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reads.gate.set()
    assert reads.ready.acquire(timeout=WAIT)
    assert reads.calls == ["a"]


def test_the_least_recently_used_goes_first(loader, reads):
    fetch(loader, reads, "a")
    fetch(loader, reads, "b")
    loader.get("a")
    fetch(loader, reads, "c")
    assert loader.nbytes == 800
    assert loader.evictions == 1
    assert loader.get("a") is not None
    assert loader.get("b") is None
    assert reads.ready.acquire(timeout=WAIT)
    loader.check()


def test_one_larger_than_the_bound_is_delivered_and_not_kept(loader, reads):
    fetch(loader, reads, "a")
    assert fetch(loader, reads, "large").nbytes == 4000
    assert loader.nbytes == 400, "nothing was evicted for it"
    assert loader.get("large") is None
    assert reads.ready.acquire(timeout=WAIT)
    loader.check()
    loader.forget("large")
    loader.check()


def test_a_failure_is_told_once_and_the_next_get_tries_again(loader, reads):
    reads.failing["a"] = AdapterError("adapter_load_failed", "gone")
    assert loader.get("a") is None
    assert reads.ready.acquire(timeout=WAIT)
    loader.check()
    with pytest.raises(AdapterError, match="gone"):
        loader.get("a")
    del reads.failing["a"]
    assert fetch(loader, reads, "a").generation == "a"
    assert reads.calls == ["a", "a"]


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), RuntimeError("odd")])
def test_any_failure_becomes_an_adapter_error_that_names_the_generation(loader, reads, error):
    reads.failing["a"] = error
    assert loader.get("a") is None
    assert reads.ready.acquire(timeout=WAIT)
    with pytest.raises(AdapterError, match="generation a could not be read") as caught:
        loader.get("a")
    assert caught.value.code == "adapter_load_failed"
    assert caught.value.__cause__ is error


def test_forget_during_a_read_drops_its_result(loader, reads):
    reads.gate.clear()
    loader.get("a")
    loader.forget("a")
    reads.gate.set()
    assert reads.ready.acquire(timeout=WAIT)
    assert loader.nbytes == 0
    assert fetch(loader, reads, "a").generation == "a"
    loader.forget("a")
    assert loader.nbytes == 0
    loader.check()


def test_two_that_do_not_fit_together_are_served_one_after_the_other(reads):
    """Each waits for a read of its own; were either put out before it is fetched, they would take turns for ever."""
    loader, line, served = Loader(reads, 400, reads.ready.release), ["a", "b", "c"], []
    for _ in range(10):
        loader.line_up(line)
        for name in tuple(line):
            if loader.get(name) is not None:
                line.remove(name)
                served.append(name)
            else:
                reads.ready.acquire(timeout=0.2)  # its read is over before the next one is asked for
            loader.check()
    loader.close()
    assert served == ["a", "b", "c"]
    assert len(reads.calls) <= 6, "what does not fit is not read over and over"


def test_one_that_was_read_stays_until_it_is_fetched(reads):
    loader = Loader(reads, 400, reads.ready.release)
    loader.line_up(["a", "b"])
    for name in ("a", "b"):
        assert loader.get(name) is None
        assert reads.ready.acquire(timeout=WAIT)
    assert loader.get("a") is not None
    loader.check()
    loader.close()


def test_the_more_urgent_one_puts_the_other_out(reads):
    loader = Loader(reads, 400, reads.ready.release)
    loader.line_up(["b"])
    fetch(loader, reads, "b")
    loader.line_up(["a", "b"])
    assert fetch(loader, reads, "a").generation == "a"
    for _ in range(5):
        assert loader.get("b") is None
        assert loader.get("a") is not None
    loader.check()
    assert reads.calls == ["b", "a"]
    loader.line_up(["b"])
    assert fetch(loader, reads, "b").generation == "b"
    loader.close()


def test_the_first_few_in_line_are_read_before_they_are_asked_for():
    reads = Reads(dict.fromkeys("abcdef", 400))
    loader = Loader(reads, 4000, reads.ready.release, threads=1)
    reads.failing["b"] = AdapterError("adapter_load_failed", "gone")
    loader.line_up("abcdef")
    for _ in range(3):
        loader.read_ahead()
    for _ in range(READ_AHEAD):
        assert reads.ready.acquire(timeout=WAIT)
    loader.read_ahead()
    assert reads.calls == ["a", "b", "c", "d"]
    assert loader.get("c").generation == "c"
    with pytest.raises(AdapterError, match="gone"):
        loader.get("b")
    loader.close()
    loader.check()


def test_a_failure_is_told_to_those_who_came_before_it(loader, reads):
    reads.failing["gone"] = AdapterError("adapter_load_failed", "gone")
    loader.line_up(["gone"])
    loader.read_ahead()
    assert reads.ready.acquire(timeout=WAIT)
    assert loader.get("gone", since=time.perf_counter()) is None, "it is read again for whoever came later"
    assert reads.ready.acquire(timeout=WAIT)
    with pytest.raises(AdapterError, match="gone"):
        loader.get("gone", since=0.0)


def test_what_is_known_not_to_fit_is_not_read_ahead(reads):
    loader = Loader(reads, 400, reads.ready.release, threads=1)
    loader.line_up(["a", "b", "large"])
    loader.read_ahead()
    for _ in range(3):
        assert reads.ready.acquire(timeout=WAIT)
    for _ in range(5):
        loader.read_ahead()
    assert loader.get("a").generation == "a"
    assert loader.get("large").generation == "large", "kept for the first who asks"
    loader.close()
    assert reads.calls == ["a", "b", "large"]


def test_what_nobody_waits_for_goes_before_what_somebody_does(loader, reads):
    fetch(loader, reads, "a")
    fetch(loader, reads, "b")  # used last, and waited for by nobody
    loader.line_up(["c", "a"])
    fetch(loader, reads, "c")
    assert loader.get("a") is not None
    assert loader.evictions == 1
    loader.check()


def test_close_ends_the_threads(reads):
    loader = Loader(reads, 800, lambda: None, threads=3)
    loader.get("a")
    loader.close()
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("adapter-loader")]
    with pytest.raises(AssertionError, match="closed"):
        loader.get("a")


class LoaderMachine(RuleBasedStateMachine):
    """Gets, lines, failures and forgets at random; after each the cache is what a simple model says."""

    names = st.sampled_from(["a", "b", "c", "d", "large"])

    @initialize()
    def start(self):
        self.reads = Reads({"a": 80, "b": 160, "c": 240, "d": 400, "large": 800})
        self.loader = Loader(self.reads, 480, self.reads.ready.release, threads=1)
        self.order: list[str] = []
        self.waiting: set[str] = set()  # oversize, read and not fetched
        self.line: list[str] = []
        self.sized: set[str] = set()  # in the line, and read before

    def _loaded(self, name):
        if self.reads.sizes[name] > 480:
            self.waiting.add(name)
            return
        self.sized |= {name} & set(self.line)
        if self._room(name) < self.reads.sizes[name]:
            return
        while sum(self.reads.sizes[other] for other in self.order) + self.reads.sizes[name] > 480:
            last = max(self._place(other) for other in self.order)
            self.order.remove(next(other for other in self.order if self._place(other) == last))
        self.order.append(name)

    def _place(self, name):
        return self.line.index(name) if name in self.line else len(self.line)

    def _room(self, name):
        ahead = [other for other in self.order if self._place(other) < self._place(name)]
        return 480 - sum(self.reads.sizes[other] for other in ahead)

    @rule(line=st.lists(names, unique=True))
    def line_up(self, line):
        self.loader.line_up(line)
        self.line = line
        self.sized = set(line) & (self.sized | set(self.order))

    @rule()
    def the_first_in_line_is_served(self):
        """Whatever lies in the cache: at its second asking at the latest."""
        if self.line:
            self.get(self.line[0])
            assert self.line[0] in (*self.order, *self.waiting) or self.reads.sizes[self.line[0]] > 480

    @rule()
    def read_ahead(self):
        self.loader.read_ahead()
        begun = []
        for name in self.line[:READ_AHEAD]:
            room = self._room(name) - sum(self.reads.sizes[other] for other in begun if other in self.sized)
            fits = name not in self.sized or self.reads.sizes[name] <= room
            if fits and name not in (*self.order, *self.waiting):
                begun.append(name)
        for name in begun:
            assert self.reads.ready.acquire(timeout=WAIT)
            self._loaded(name)

    @rule(name=names)
    def get(self, name):
        adapter = self.loader.get(name)
        if name in self.order:
            assert adapter is not None
            self.order.remove(name)
            self.order.append(name)
        elif name in self.waiting:
            assert adapter is not None
            self.waiting.discard(name)
        elif name in self.sized and self._room(name) < self.reads.sizes[name]:
            assert adapter is None
        else:
            assert adapter is None
            assert self.reads.ready.acquire(timeout=WAIT)
            self._loaded(name)

    @rule(name=names)
    def get_failing(self, name):
        if name in self.order or name in self.waiting or name in self.sized:
            return
        self.reads.failing[name] = OSError("no")
        assert self.loader.get(name) is None
        assert self.reads.ready.acquire(timeout=WAIT)
        del self.reads.failing[name]
        with pytest.raises(AdapterError):
            self.loader.get(name)

    @rule(name=names)
    def forget(self, name):
        self.loader.forget(name)
        self.waiting.discard(name)
        self.sized.discard(name)
        if name in self.order:
            self.order.remove(name)

    @invariant()
    def books_agree(self):
        if not hasattr(self, "loader"):
            return
        self.loader.check()
        assert self.loader.nbytes == sum(self.reads.sizes[name] for name in self.order)
        assert not self.reads.ready.acquire(blocking=False), "a read that the model knows nothing of"

    def teardown(self):
        if hasattr(self, "loader"):
            self.loader.close()


LoaderMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestLoaderMachine = LoaderMachine.TestCase
