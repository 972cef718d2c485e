"""The pool against a model of it: pages are never lost or shared, and hold what was admitted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from adapters.adapter import Adapter, Layout
from adapters.errors import AdapterError
from adapters.pages import PAGE_RANK, pages_needed
from adapters.pool import Pool
from tests.adapters.samples import DOWN, QKV, make_adapter, make_layout, shapes

LAYOUT = make_layout()


def make_pool(pages: int = 2, dtype: torch.dtype = torch.float32) -> Pool:
    return Pool(LAYOUT, dict.fromkeys(LAYOUT.groups, pages), dtype, "cpu")


def assert_holds(pool: Pool, layout: Layout, adapter: Adapter) -> None:
    """The pages give back every factor, and nothing beside them."""
    table = pool.pages(adapter.generation)
    deltas = {(delta.site, delta.member): delta for delta in adapter.deltas}
    for module, (site, member) in layout.modules.items():
        held = table.get(layout.sites[site].group, ())
        inside, outside = shapes(layout, module)
        before = sum(other.out_features for other in layout.sites[site].members[:member])
        pages = pool.sites[site]
        a = torch.cat([pages.a[page, member] for page in held] or [torch.zeros(0, inside)])
        b = torch.cat(
            [pages.b[page, :, before : before + outside] for page in held] or [torch.zeros(0, outside)]
        )
        scale = [float(pages.scale[page, member]) for page in held]
        delta = deltas.get((site, member))
        rank = delta.rank if delta else 0
        if delta:
            assert torch.equal(a[:rank], delta.a.to(a.dtype))
            assert torch.equal(b[:rank], delta.b.to(b.dtype))
        assert not a[rank:].any()
        assert not b[rank:].any()
        used = -(-rank // PAGE_RANK)
        assert scale == [delta.scale if delta else 0.0] * used + [0.0] * (len(held) - used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 16, 17, 64])
def test_pages_hold_the_raw_factors_and_zeros_past_the_rank(rank, dtype):
    pool = make_pool(4, dtype)
    for site in pool.sites:
        site.a.fill_(7)
        site.b.fill_(7)
        site.scale.fill_(7)
    adapter = make_adapter(LAYOUT, "g", {"0.self_attn.q_proj": rank, "v_proj": 2})
    assert pool.admit(adapter)
    assert_holds(pool, LAYOUT, adapter)
    assert pool.used == -(-rank // PAGE_RANK)
    assert set(pool.pages("g")) == {QKV}
    pool.check()


def test_every_group_needs_pages():
    with pytest.raises(ValueError, match="at least one page"):
        Pool(LAYOUT, {QKV: 1}, torch.float32, "cpu")
    with pytest.raises(ValueError, match="at least one page"):
        make_pool(0)


def test_an_adapter_that_could_never_fit_is_refused():
    pool = make_pool(2)
    pool.fits(make_adapter(LAYOUT, "g", {"q_proj": 32}))
    with pytest.raises(AdapterError, match="needs 3 pages of 16 rank rows, the pool has 2") as caught:
        pool.fits(make_adapter(LAYOUT, "g", {"q_proj": 33}))
    assert caught.value.code == "adapter_too_large"
    assert not pool.admit(make_adapter(LAYOUT, "g", {"q_proj": 33}))


def test_the_least_recently_used_goes_first_and_the_pinned_stay():
    pool = make_pool(2)
    one, two, three = (make_adapter(LAYOUT, name, {"q_proj": 4}) for name in ("one", "two", "three"))
    assert pool.admit(one)
    assert pool.admit(two)
    assert pool.admit(one)  # used again
    assert pool.admit(three)
    assert pool.residents == ("one", "three")
    pool.pin("one")
    pool.pin("three")
    assert not pool.admit(two)
    pool.unpin("three")
    pool.unpin("one")
    assert pool.admit(two)
    assert pool.residents == ("one", "two")
    assert pool.evictions == 2


def test_nothing_is_evicted_in_vain():
    pool = make_pool(2)
    assert pool.admit(make_adapter(LAYOUT, "small", {"q_proj": 4}))
    assert pool.admit(make_adapter(LAYOUT, "held", {"q_proj": 4}))
    pool.pin("held")
    assert not pool.admit(make_adapter(LAYOUT, "large", {"q_proj": 32}))
    assert pool.resident("small")
    assert pool.admit(make_adapter(LAYOUT, "elsewhere", {"down_proj": 32}))
    assert pool.resident("small"), "its group has what another lacks"
    assert set(pool.pages("elsewhere")) == {DOWN}


def test_a_pinned_generation_is_forgotten_at_its_last_unpin():
    pool = make_pool()
    adapter = make_adapter(LAYOUT, "g", {"q_proj": 4})
    pool.admit(adapter)
    pool.pin("g")
    pool.pin("g")
    pool.forget("g")
    pool.unpin("g")
    assert pool.resident("g")
    pool.unpin("g")
    assert not pool.resident("g")
    assert pool.used == 0
    pool.forget("g")  # unknown: nothing happens
    pool.check()


def test_a_forgotten_generation_that_is_admitted_again_stays():
    pool = make_pool()
    adapter = make_adapter(LAYOUT, "g", {"q_proj": 4})
    pool.admit(adapter)
    pool.pin("g")
    pool.forget("g")
    assert pool.admit(adapter)
    pool.unpin("g")
    assert pool.resident("g")
    pool.check()


def test_pins_of_what_is_not_there_are_our_mistake():
    pool = make_pool()
    for misuse in (pool.pin, pool.unpin, pool.pages):
        with pytest.raises(AssertionError):
            misuse("g")


GROUP_TAILS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
RANKS = st.dictionaries(
    st.sampled_from(GROUP_TAILS), st.sampled_from([1, 4, 16, 20, 40]), min_size=1, max_size=3
)


class PoolMachine(RuleBasedStateMachine):
    adapters = Bundle("adapters")

    @initialize(pages=st.lists(st.integers(1, 4), min_size=4, max_size=4))
    def start(self, pages):
        self.pool = Pool(LAYOUT, dict(zip(LAYOUT.groups, pages, strict=True)), torch.float32, "cpu")
        self.sizes = dict(zip(LAYOUT.groups, pages, strict=True))
        self.made = 0
        self.order: list[str] = []  # least recently used first
        self.known: dict[str, Adapter] = {}
        self.pins: dict[str, int] = {}
        self.doomed: set[str] = set()

    @rule(target=adapters, ranks=RANKS)
    def make(self, ranks):
        self.made += 1
        return make_adapter(LAYOUT, f"g{self.made}", ranks, seed=self.made)

    @rule(adapter=adapters)
    def admit(self, adapter):
        name = adapter.generation
        was = set(self.pool.residents)
        unpinned = [other for other in self.order if other not in self.pins]
        admitted = self.pool.admit(adapter)
        gone = was - set(self.pool.residents)
        assert gone <= set(unpinned)
        if name in was:
            assert admitted
            assert not gone
        elif admitted:
            self.known[name] = adapter
        else:
            assert not gone
            assert self._impossible(adapter)
        if admitted:
            assert all(group in self.pool.pages(name) for group in pages_needed(adapter, LAYOUT))
            self.order = [other for other in self.order if other not in gone and other != name] + [name]
            self.doomed.discard(name)

    def _impossible(self, adapter):
        """Even with every unpinned generation gone, a group would be short."""
        for group, count in pages_needed(adapter, LAYOUT).items():
            pinned = sum(len(self.pool.pages(name).get(group, ())) for name in self.pins)
            if count > self.sizes[group] - pinned:
                return True
        return False

    @rule(adapter=adapters)
    def pin(self, adapter):
        name = adapter.generation
        if self.pool.resident(name):
            self.pool.pin(name)
            self.pins[name] = self.pins.get(name, 0) + 1

    @rule(adapter=adapters)
    def unpin(self, adapter):
        name = adapter.generation
        if name not in self.pins:
            return
        self.pool.unpin(name)
        self.order.remove(name)
        self.order.append(name)
        self.pins[name] -= 1
        if not self.pins[name]:
            del self.pins[name]
            if name in self.doomed:
                self.doomed.discard(name)
                self.order.remove(name)

    @rule(adapter=adapters)
    def forget(self, adapter):
        name = adapter.generation
        self.pool.forget(name)
        if name in self.pins:
            self.doomed.add(name)
        elif name in self.order:
            self.order.remove(name)

    @invariant()
    def books_agree(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert list(self.pool.residents) == self.order
        for name in self.order:
            assert_holds(self.pool, LAYOUT, self.known[name])


PoolMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestPoolMachine = PoolMachine.TestCase
