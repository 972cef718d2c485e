"""Pages written beside the steps: the same bytes as at once, in an order that no step can see."""

import threading
from concurrent.futures import Future

import pytest
import torch

from adapters.errors import AdapterError
from adapters.page_copy import copy_now
from adapters.pool import Pool
from adapters.side_stream import SLOTS, SideStream
from tests.adapters.samples import make_adapter, make_layout
from tests.fake_cuda import FakeCuda

LAYOUT = make_layout()
TARGETS = {"0.self_attn.q_proj": 40, "v_proj": 2, "down_proj": 5}


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr("adapters.side_stream.cuda", fake)
    return fake


def make_pool(pages=4):
    pool = Pool(LAYOUT, dict.fromkeys(LAYOUT.groups, pages), torch.bfloat16, "cpu")
    for site in pool.sites:
        for tensor in (site.a, site.b, site.scale):
            tensor.fill_(7)
    return pool


@pytest.mark.parametrize("slot_pages", [1, 3, 100])
def test_pages_are_the_same_as_when_written_at_once(cuda, monkeypatch, slot_pages):
    monkeypatch.setattr("adapters.side_stream.SLOT_PAGES", slot_pages)
    adapter = make_adapter(LAYOUT, "g", TARGETS)
    at_once, beside = make_pool(), make_pool()
    at_once.admit(adapter)
    ready = threading.Event()
    side = SideStream(beside.sites, ready.set)
    beside.copy = side.copy
    beside.admit(adapter)
    assert ready.wait(30)
    side.close()
    assert beside.resident("g")
    assert beside.pages("g") == at_once.pages("g")
    for ours, theirs in zip(beside.sites, at_once.sites, strict=True):
        assert torch.equal(ours.a, theirs.a)
        assert torch.equal(ours.b, theirs.b)
        assert torch.equal(ours.scale, theirs.scale)
    assert beside.load_seconds.count == 1


def test_the_stream_waits_for_what_was_launched_and_a_slot_for_its_last_copy(cuda, monkeypatch):
    monkeypatch.setattr("adapters.side_stream.SLOT_PAGES", 1)
    pool = make_pool()
    side = SideStream(pool.sites, lambda: None)
    pool.copy = side.copy
    pool.admit(make_adapter(LAYOUT, "g", TARGETS))
    side.close()
    launched, waited = cuda.log[0], next(entry for entry in cuda.log if entry[0] == "wait")
    assert launched[0] == "record"
    assert launched[2] == "the engine's stream"
    assert waited == ("wait", side._stream, launched[1])
    written = [e for e in cuda.log if e[0] == "record" and e[2] is side._stream]
    assert len(written) > SLOTS + 1, "the case is too small to use a slot twice"
    for place, slot in enumerate(side._slots):
        used = [e for e in cuda.log if e[1] is slot.free]
        assert [e[0] for e in used] == ["synchronize", "record"] * (len(used) // 2), place
    assert cuda.log[-1] == ("synchronize", written[-1][1]), "it is done when the last copy is"


class Deferred:
    """Copies that end when the test says so."""

    def __init__(self):
        self.begun = []

    def copy(self, copies):
        self.begun.append((copies, Future()))
        return self.begun[-1][1]

    def end(self, error=None):
        copies, future = self.begun.pop(0)
        if error:
            future.set_exception(error)
        else:
            future.set_result(copy_now(copies).result())


@pytest.fixture
def pool():
    made = make_pool(1)
    made.deferred = Deferred()
    made.copy = made.deferred.copy
    return made


def adapter(name):
    return make_adapter(LAYOUT, name, {"q_proj": 4})


def test_what_arrives_is_not_resident_and_keeps_its_pages(pool):
    assert pool.admit(adapter("one"))
    assert pool.arriving("one")
    assert not pool.resident("one")
    assert pool.residents == ()
    assert not pool.admit(adapter("two")), "pages that are being written were taken away"
    pool.check()
    pool.deferred.end()
    assert pool.resident("one")
    assert not pool.arriving("one")
    assert pool.residents == ("one",)
    pool.check()
    assert pool.admit(adapter("two"))
    assert not pool.resident("one")


def test_what_is_forgotten_on_its_way_is_freed_when_it_has_come(pool):
    pool.admit(adapter("one"))
    pool.forget("one")
    pool.check()
    assert not pool.admit(adapter("two"))
    pool.deferred.end()
    assert not pool.resident("one")
    assert pool.used == 0
    assert pool.admit(adapter("two"))
    pool.check()


def test_one_that_is_asked_for_again_on_its_way_stays(pool):
    pool.admit(adapter("one"))
    pool.forget("one")
    assert pool.admit(adapter("one"))
    assert len(pool.deferred.begun) == 1
    pool.deferred.end()
    assert pool.resident("one")
    pool.check()


def test_a_copy_that_fails_is_not_taken_for_one_that_came(pool):
    pool.admit(adapter("one"))
    pool.deferred.end(AdapterError("x", "the device is gone"))
    with pytest.raises(AdapterError, match="the device is gone"):
        pool.resident("one")
    assert not pool.resident("one")
    assert pool.used == 0
    pool.check()
