"""The arithmetic of pages: what one takes, how many a budget holds, and how many an adapter needs.

Knows nothing of which pages are free, or of tensors.
"""

from __future__ import annotations

import torch

from adapters.adapter import Adapter, Layout

PAGE_RANK = 16  # rank rows of a page


def page_nbytes(layout: Layout, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of one page of each group: a page id is valid in all layers of its group."""
    found: dict[str, int] = {}
    for group, indices in layout.groups.items():
        sites = [layout.sites[index] for index in indices]
        elements = sum(
            PAGE_RANK * (len(site.members) * site.in_features + site.out_features) for site in sites
        )
        scales = sum(len(site.members) for site in sites)
        found[group] = elements * dtype.itemsize + scales * torch.float32.itemsize
    return found


def plan_pages(layout: Layout, dtype: torch.dtype, budget_bytes: int) -> dict[str, int]:
    """The same number of pages in every group, as many as the budget holds."""
    each = sum(page_nbytes(layout, dtype).values())
    if not each:
        raise ValueError("the base has no adaptable module, so there is nothing to plan pages for")
    count = budget_bytes // each
    if count < 1:
        raise ValueError(
            f"adapter memory of {budget_bytes} bytes is less than one page of every group ({each} bytes); "
            f"give it at least {each} bytes"
        )
    return dict.fromkeys(layout.groups, count)


def pages_needed(adapter: Adapter, layout: Layout) -> dict[str, int]:
    """Group to the number of pages that the adapter takes there: its largest rank of the group, in pages."""
    needed: dict[str, int] = {}
    for delta in adapter.deltas:
        group = layout.sites[delta.site].group
        needed[group] = max(needed.get(group, 0), -(-delta.rank // PAGE_RANK))
    return needed
