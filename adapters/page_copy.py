"""What one page of one site holds of an adapter, and how it is written there. Knows nothing of which page is whose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter import Delta, Site
from adapters.pages import PAGE_RANK


@dataclass(frozen=True, slots=True)
class SitePages:
    """One site's pages: the raw factors of every resident adapter, and the scale of each page and member."""

    a: Tensor  # [pages, members, 16, in]
    b: Tensor  # [pages, 16, sum(out)]: the members' outputs side by side
    scale: Tensor  # [pages, members] float32; 0 where the page's adapter leaves the member alone

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.a, self.b, self.scale


@dataclass(frozen=True, slots=True)
class Page:
    """One page of one site, as views of where it lies; made once for memory that is filled again and again."""

    factors: tuple[tuple[Tensor, Tensor], ...]  # of each member [16, in] and [16, its out]
    scale: Tensor  # [members]

    @classmethod
    def of(cls, pages: SitePages, page: int, site: Site) -> Page:
        columns = pages.b[page].split([member.out_features for member in site.members], dim=1)
        return cls(tuple(zip(pages.a[page].unbind(), columns, strict=True)), pages.scale[page])


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Rank rows `first:first + 16` of an adapter's deltas at one site are to be written to one of its pages."""

    pages: SitePages
    page: int
    site: Site
    deltas: Mapping[int, Delta]  # by member; those that the adapter leaves alone are not there
    first: int


def write(copies: Iterable[tuple[PageCopy, Page]]) -> None:
    """Overwrite every row of these pages, with zeros where the adapter has none.

    In two calls for all of them: around each a thread gives Python's lock away and takes it from whoever runs steps.
    """
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    unused: list[Tensor] = []
    for copy, page in copies:
        scales = [0.0] * len(page.factors)
        for member, (a, b) in enumerate(page.factors):
            delta = copy.deltas.get(member)
            rows = 0 if delta is None else min(max(delta.rank - copy.first, 0), PAGE_RANK)
            if rows < PAGE_RANK:
                unused += (a[rows:], b[rows:])
                a, b = a[:rows], b[:rows]
            if delta is not None and rows:
                taken = slice(copy.first, copy.first + rows)
                targets += (a, b)
                sources += (delta.a[taken], delta.b[taken])
                scales[member] = delta.scale
        targets.append(page.scale)
        sources.append(torch.tensor(scales))
    torch._foreach_copy_(targets, sources)
    if unused:
        torch._foreach_zero_(unused)


# begins to write; the result is how many seconds it took
Copy = Callable[[Iterable[PageCopy]], "Future[float]"]


def copy_now(copies: Iterable[PageCopy]) -> Future[float]:
    """Write before returning: where the pool is in host memory."""
    started = time.perf_counter()
    write((copy, Page.of(copy.pages, copy.page, copy.site)) for copy in copies)
    done: Future[float] = Future()
    done.set_result(time.perf_counter() - started)
    return done
