"""What one page of one site holds of an adapter, and how it is written there. Knows nothing of which page is whose."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from adapters.adapter import Delta, Site
from adapters.pages import PAGE_RANK


@dataclass(frozen=True, slots=True)
class SitePages:
    """One site's pages: the raw factors of every resident adapter, and the scale of each page and member."""

    a: Tensor  # [pages, members, 16, in]
    b: Tensor  # [pages, 16, sum(out)]: the members' outputs side by side
    scale: Tensor  # [pages, members] float32; 0 where the page's adapter leaves the member alone


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Rank rows `first:first + 16` of an adapter's deltas at one site are to be written to one of its pages."""

    pages: SitePages
    page: int
    site: Site
    deltas: Mapping[int, Delta]  # by member; those that the adapter leaves alone are not there
    first: int

    def fill(self, into: SitePages, at: int) -> None:
        """Overwrite every row of page `at`, with zeros where the adapter has none."""
        column = 0
        for member, described in enumerate(self.site.members):
            columns = slice(column, column + described.out_features)
            column = columns.stop
            self._fill_member(into, at, member, columns)

    def _fill_member(self, into: SitePages, at: int, member: int, columns: slice) -> None:
        delta = self.deltas.get(member)
        rows = 0 if delta is None else min(max(delta.rank - self.first, 0), PAGE_RANK)
        a, b = into.a[at, member], into.b[at, :, columns]
        if delta is not None and rows:
            a[:rows].copy_(delta.a[self.first : self.first + rows])
            b[:rows].copy_(delta.b[self.first : self.first + rows])
        if rows < PAGE_RANK:
            a[rows:].zero_()
            b[rows:].zero_()
        into.scale[at, member] = delta.scale if delta is not None and rows else 0.0


Copy = Callable[
    [Sequence[PageCopy]], "Future[float]"
]  # begins to write; the result is how many seconds it took


def copy_now(copies: Sequence[PageCopy]) -> Future[float]:
    """Write before returning: where the pool is in host memory."""
    started = time.perf_counter()
    for copy in copies:
        copy.fill(copy.pages, copy.page)
    done: Future[float] = Future()
    done.set_result(time.perf_counter() - started)
    return done
