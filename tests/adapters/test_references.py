"""References: counted by generation, given back once, and the last one heard of."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters.references import Reference, References


@pytest.fixture
def last():
    return []


@pytest.fixture
def references(last):
    return References(last.append)


def test_only_the_last_release_of_a_generation_is_told(references, last):
    one, two, other = (references.hold(*pair) for pair in (("legal", "g"), ("law", "g"), ("tax", "h")))
    assert (one.name, one.generation) == ("legal", "g")
    assert (references.count("g"), references.count("h"), references.count("i")) == (2, 1, 0)
    one.release()
    one.release()
    assert last == []
    assert references.held() == {"g", "h"}
    two.release()
    two.release()
    assert last == [two]
    other.release()
    assert references.held() == frozenset()
    references.check()


def test_leaving_a_with_lets_go(references, last):
    with references.hold("legal", "g") as reference:
        assert references.count("g") == 1
    assert last == [reference]


def test_a_late_second_release_takes_nothing_from_a_new_holder(references, last):
    old = references.hold("legal", "g")
    old.release()
    references.hold("legal", "g")
    old.release()
    assert references.count("g") == 1
    assert last == [old]


def test_whoever_is_told_may_ask_and_hold_again():
    seen: list[int] = []

    def on_last(reference: Reference) -> None:
        seen.append(references.count(reference.generation))
        references.hold(reference.name, reference.generation)

    references = References(on_last)
    references.hold("legal", "g").release()
    assert seen == [0]
    assert references.count("g") == 1


def test_threads_release_one_reference_once(references, last):
    for _ in range(50):
        shared = references.hold("legal", "g")
        start = threading.Barrier(4)
        threads = [
            threading.Thread(target=lambda: (start.wait(), shared.release()))  # noqa: B023 - joined below
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(last) == 50
    references.check()
    assert references.held() == frozenset()


def test_check_sees_a_reference_under_another_generation(references):
    references.hold("legal", "g").generation = "h"
    with pytest.raises(AssertionError, match="filed amiss"):
        references.check()


class ReferencesMachine(RuleBasedStateMachine):
    generations = st.sampled_from(["g", "h", "i"])

    @initialize()
    def start(self):
        self.last: list[Reference] = []
        self.references = References(self.last.append)
        self.held: list[Reference] = []
        self.released: list[Reference] = []

    @rule(generation=generations)
    def hold(self, generation):
        self.held.append(self.references.hold("name", generation))

    @rule(which=st.integers(0, 50))
    def release(self, which):
        if self.held:
            reference = self.held.pop(which % len(self.held))
            self.last.clear()
            reference.release()
            alone = all(other.generation != reference.generation for other in self.held)
            assert self.last == ([reference] if alone else [])
            self.released.append(reference)

    @rule(which=st.integers(0, 50))
    def release_again(self, which):
        if self.released:
            self.last.clear()
            self.released[which % len(self.released)].release()
            assert self.last == []

    @invariant()
    def books_agree(self):
        if not hasattr(self, "references"):
            return
        self.references.check()
        assert self.references.held() == {reference.generation for reference in self.held}
        for generation in ("g", "h", "i"):
            found = sum(reference.generation == generation for reference in self.held)
            assert self.references.count(generation) == found


ReferencesMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestReferencesMachine = ReferencesMachine.TestCase
