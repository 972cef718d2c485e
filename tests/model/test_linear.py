"""Siblings share one base product: who computes, who reads, and when it is let go."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from adapters.adapter import Member, Site
from adapters.page_copy import SitePages
from kernels.segments import Segment, Spans
from server.model.context import ForwardContext, forward_context
from server.model.linear import LinearGroup, LoRALinear, PlainDeltas
from tests.kernels.naive import PAGE_RANK, add_deltas

SITE = Site("qkv", 8, (Member("q", 6), Member("k", 4), Member("v", 4)))


class CountingBase:
    def __init__(self):
        self.weight = torch.randn(14, 8)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x @ self.weight.T


@pytest.fixture
def group():
    return LinearGroup(SITE, CountingBase())


def test_the_first_sibling_computes_for_all(group):
    q, k, v = (LoRALinear(group, member) for member in range(3))
    x = torch.randn(1, 5, 8)
    got = torch.cat([q(x), k(x), v(x)], dim=-1)
    assert group.base.calls == 1
    assert torch.allclose(got, x @ group.base.weight.T)
    assert [module.out_features for module in (q, k, v)] == [6, 4, 4]


def test_another_input_is_computed_anew(group):
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    group.output(x, 0)
    assert torch.equal(group.output(y, 1), (y @ group.base.weight.T)[:, 6:10])
    assert group.base.calls == 2
    equal = y.clone()
    group.output(equal, 2)
    assert group.base.calls == 3, "another tensor is another input, whatever it holds"


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2), (0, 0, 1, 2), (0, 2)])
def test_any_order_gives_the_same(group, order):
    x = torch.randn(3, 8)
    want = (x @ group.base.weight.T).split(group.widths, dim=-1)
    for member in order:
        assert torch.equal(group.output(x, member), want[member])


def test_nothing_is_kept_after_the_last_sibling(group):
    x = torch.randn(3, 8)
    input_gone = weakref.ref(x)
    outputs = [group.output(x, member) for member in range(3)]
    output_gone = weakref.ref(outputs[0])
    del x, outputs
    gc.collect()
    assert input_gone() is None
    assert output_gone() is None


def test_an_input_changed_in_place_after_the_last_sibling_is_seen(group):
    x = torch.randn(3, 8)
    for member in range(3):
        group.output(x, member)
    x.mul_(2)
    assert torch.equal(group.output(x, 0), (x @ group.base.weight.T)[:, :6])


def context(segments):
    return ForwardContext(torch.zeros(5, dtype=torch.int64), Spans((), 16, torch.device("cpu")), segments, ())


def test_deltas_of_its_own_group_are_added(group):
    a, b = torch.randn(3, 3, PAGE_RANK, 8), torch.randn(3, PAGE_RANK, 14)
    scale = torch.rand(3, 3)
    group.deltas = PlainDeltas(SitePages(a, b, scale), group.widths)
    segments = (Segment(1, 4, (2, 0), (1.0, 0.5)),)
    x = torch.randn(1, 5, 8)
    plain = x[0] @ group.base.weight.T
    want = add_deltas(plain, x[0], a, b, scale, group.widths, segments)
    with forward_context(context({"qkv": segments, "other": (Segment(0, 5, (1,), (1.0,)),)})):
        got = torch.cat([group.output(x, member) for member in range(3)], dim=-1)[0]
    assert torch.allclose(got.double(), want, atol=1e-4)
    assert torch.equal(got[[0, 4]], plain[[0, 4]])


def test_rows_of_another_number_than_the_steps_are_refused(group):
    """Segments say which of the step's rows read which pages: on fewer rows they would point past the end."""
    group.deltas = PlainDeltas(
        SitePages(*map(torch.zeros, [(1, 3, PAGE_RANK, 8), (1, PAGE_RANK, 14), (1, 3)])), group.widths
    )
    with forward_context(context({})), pytest.raises(AssertionError, match="qkv is given 4 rows"):
        group.output(torch.randn(1, 4, 8), 0)


@pytest.mark.parametrize("inside", [False, True])
def test_without_a_context_or_pages_there_is_the_base_alone(group, inside):
    x = torch.randn(5, 8)
    if not inside:
        pages = SitePages(torch.randn(1, 3, PAGE_RANK, 8), torch.randn(1, PAGE_RANK, 14), torch.ones(1, 3))
        group.deltas = PlainDeltas(pages, group.widths)
    segments = {"qkv": (Segment(0, 5, (0,), (1.0,)),)}
    with forward_context(context(segments)) if inside else nullcontext():
        assert torch.equal(group.output(x, 0), (x @ group.base.weight.T)[:, :6])
