"""The arithmetic of pages, against the tensors that a pool makes of it."""

from __future__ import annotations

import pytest
import torch

from adapters.adapter import Layout
from adapters.pages import page_nbytes, pages_needed, plan_pages
from adapters.pool import Pool
from tests.adapters.samples import DOWN, QKV, make_adapter, make_layout

LAYOUT = make_layout()


def test_page_nbytes_is_what_the_tensors_take():
    pool = Pool(LAYOUT, dict.fromkeys(LAYOUT.groups, 3), torch.bfloat16, "cpu")
    each = page_nbytes(LAYOUT, torch.bfloat16)
    for group, indices in LAYOUT.groups.items():
        sites = [pool.sites[index] for index in indices]
        assert 3 * each[group] == sum(site.a.nbytes + site.b.nbytes + site.scale.nbytes for site in sites)


def test_plan_pages_fills_the_budget_evenly():
    each = sum(page_nbytes(LAYOUT, torch.float32).values())
    assert plan_pages(LAYOUT, torch.float32, 3 * each - 1) == dict.fromkeys(LAYOUT.groups, 2)
    with pytest.raises(ValueError, match=f"give it at least {each} bytes"):
        plan_pages(LAYOUT, torch.float32, each - 1)
    with pytest.raises(ValueError, match="no adaptable module"):
        plan_pages(Layout(()), torch.float32, 1)


@pytest.mark.parametrize(("rank", "count"), [(1, 1), (16, 1), (17, 2), (64, 4)])
def test_the_largest_rank_of_a_group_counts(rank, count):
    adapter = make_adapter(LAYOUT, "g", {"q_proj": rank, "v_proj": 1, "down_proj": 1})
    assert pages_needed(adapter, LAYOUT) == {QKV: count, DOWN: 1}
