"""Device memory for adapters, in pages of 16 rank rows: who holds which page, and what a page holds.

Knows nothing of names, of files or of how pages are multiplied. One thread, the engine's, changes it; `fits`
looks only at sizes that never change, so any thread may ask.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from types import MappingProxyType

import torch

from adapters.adapter import Adapter, Delta, Layout
from adapters.errors import AdapterError, Finding
from adapters.memory import zeros
from adapters.page_copy import Copy, PageCopy, SitePages, copy_now
from adapters.pages import PAGE_RANK, pages_needed
from adapters.tally import Tally

PageTable = Mapping[str, tuple[int, ...]]  # group -> page ids; only the groups that the adapter targets


class Pool:
    """Pages of every group: one free list and one page table per group; admission is all groups or none.

    Eviction takes the generation whose last admit or unpin is the longest ago, and never a pinned one. An admitted
    generation is resident when `copy` has written its pages; until then it is arriving, and holds them.
    """

    def __init__(
        self,
        layout: Layout,
        pages: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if set(pages) != set(layout.groups) or min(pages.values(), default=1) < 1:
            raise ValueError(
                f"every group needs at least one page: {list(layout.groups)}, given {dict(pages)}"
            )
        self._layout = layout
        self._total = dict(pages)
        self._free = {group: list(range(count))[::-1] for group, count in pages.items()}
        self._tables: OrderedDict[str, PageTable] = OrderedDict()  # least recently used first
        self._pins: dict[str, int] = {}
        self._arriving: dict[str, Future[float]] = {}  # being copied
        self._unused: set[str] = set()  # not pinned since they were admitted
        self._doomed: set[str] = set()  # forgotten while pinned or arriving: freed when they are neither
        self.load_seconds = Tally()  # of copies to the device
        self._evictions = 0
        self.let_go = 0  # times that pages were freed, or that a generation ceased to hold its own fast
        self._sites = tuple(
            SitePages(
                a=zeros((pages[site.group], len(site.members), PAGE_RANK, site.in_features), dtype, device),
                b=zeros((pages[site.group], PAGE_RANK, site.out_features), dtype, device),
                scale=zeros((pages[site.group], len(site.members)), torch.float32, device),
            )
            for site in layout.sites
        )
        self.copy: Copy = copy_now

    @property
    def sites(self) -> tuple[SitePages, ...]:
        """The page tensors, indexed as the layout's sites; allocated once."""
        return self._sites

    @property
    def total(self) -> int:
        """Pages of all groups."""
        return sum(self._total.values())

    @property
    def room(self) -> int:
        """How many adapters of one page in every group fit together."""
        return min(self._total.values())

    @property
    def used(self) -> int:
        """Pages held by resident generations, over all groups."""
        return self.total - sum(len(free) for free in self._free.values())

    @property
    def evictions(self) -> int:
        """Generations evicted so far to make room."""
        return self._evictions

    @property
    def residents(self) -> tuple[str, ...]:
        """The resident generations, least recently used first."""
        return tuple(each for each in tuple(self._tables) if each not in self._arriving)

    def resident(self, generation: str) -> bool:
        """Whether the generation's weights are in pages now."""
        self._settle()
        return generation in self._tables and generation not in self._arriving

    def arriving(self, generation: str) -> bool:
        """Whether the generation has pages that are being written."""
        return generation in self._arriving

    def unused(self, generation: str) -> bool:
        """Whether nobody has pinned the generation since it was admitted."""
        return generation in self._unused

    def pages(self, generation: str) -> PageTable:
        """The page table of a resident generation."""
        assert self.resident(generation), f"{generation} is not resident"
        return self._tables[generation]

    def fits(self, adapter: Adapter) -> None:
        """Refuse an adapter that could not be admitted even to an empty pool."""
        findings = tuple(
            Finding(group, f"needs {count} pages of {PAGE_RANK} rank rows, the pool has {self._total[group]}")
            for group, count in pages_needed(adapter, self._layout).items()
            if count > self._total[group]
        )
        if findings:
            raise AdapterError(
                "adapter_too_large",
                f"an adapter of rank {adapter.rank} is larger than the whole adapter pool; "
                "train a lower rank, or raise --adapter-memory-bytes or --max-loras",
                findings,
            )

    def admit(self, adapter: Adapter) -> bool:
        """Give the adapter pages and begin to write them, evicting the least recently used if need be.

        False if that won't do.
        """
        generation = adapter.generation
        if generation in self._tables:
            self._doomed.discard(generation)
            self._tables.move_to_end(generation)
            return True
        needed = pages_needed(adapter, self._layout)
        victims = self._victims(needed)
        if victims is None:
            return False
        for victim in victims:
            self._release(victim)
            self._evictions += 1
        table = {
            group: tuple(self._free[group].pop() for _ in range(count)) for group, count in needed.items()
        }
        self._tables[generation] = MappingProxyType(table)
        self._unused.add(generation)
        self._arriving[generation] = self.copy(self._copies(adapter, table))
        self._settle()
        return True

    def pin(self, generation: str) -> None:
        """Hold a resident generation's pages; counted."""
        assert self.resident(generation), f"{generation} is not resident"
        self._unused.discard(generation)
        self._pins[generation] = self._pins.get(generation, 0) + 1

    def unpin(self, generation: str) -> None:
        """Undo one pin; at the last one a forgotten generation is freed."""
        count = self._pins.get(generation, 0)
        assert count > 0, f"{generation} is not pinned"
        self._tables.move_to_end(generation)
        if count > 1:
            self._pins[generation] = count - 1
            return
        del self._pins[generation]
        self.let_go += 1
        if generation in self._doomed:
            self._release(generation)

    def forget(self, generation: str) -> None:
        """Free the generation's pages, now, at its last unpin or when they are written. Another is left alone."""
        self._settle()
        if generation in self._pins or generation in self._arriving:
            self._doomed.add(generation)
        elif generation in self._tables:
            self._release(generation)

    def check(self) -> None:
        """Every page is free or held by exactly one generation, and the books agree."""
        for group, total in self._total.items():
            held = [page for table in self._tables.values() for page in table.get(group, ())]
            assert sorted(held + self._free[group]) == list(range(total)), f"pages lost or shared in {group}"
        assert all(self._tables.values()), "a resident generation holds no page"
        assert all(count > 0 for count in self._pins.values()), "a pin count of zero is kept"
        self._settle()
        assert self._pins.keys() <= self._tables.keys(), "a pinned generation is not resident"
        assert self._arriving.keys() <= self._tables.keys() - self._pins.keys(), "pages are read and written"
        assert self._unused <= self._tables.keys() - self._pins.keys()
        assert self._doomed <= self._pins.keys() | self._arriving.keys(), "one that was forgotten is kept"
        assert 0 <= self.used <= self.total

    def _victims(self, needed: Mapping[str, int]) -> list[str] | None:
        """Whom to evict so that `needed` is free, oldest first; None if even all unpinned would not do."""
        lacking = {group: count - len(self._free[group]) for group, count in needed.items()}
        victims: list[str] = []
        for generation, table in self._tables.items():
            held_fast = generation in self._pins or generation in self._arriving
            if held_fast or not any(lacking.get(group, 0) > 0 for group in table):
                continue
            victims.append(generation)
            for group, held in table.items():
                if group in lacking:
                    lacking[group] -= len(held)
        return victims if all(count <= 0 for count in lacking.values()) else None

    def _settle(self) -> None:
        """Note which copies have ended; raises the error of one that failed, whose pages are free again."""
        for generation, copied in tuple(self._arriving.items()):
            if copied.done():
                del self._arriving[generation]
                self.let_go += 1
                if generation in self._doomed or copied.exception() is not None:
                    self._release(generation)
                self.load_seconds.add(copied.result())

    def _release(self, generation: str) -> None:
        self.let_go += 1
        for group, held in self._tables.pop(generation).items():
            self._free[group].extend(held)
        self._doomed.discard(generation)
        self._unused.discard(generation)

    def _copies(self, adapter: Adapter, table: PageTable) -> Iterator[PageCopy]:
        """What has to be written where: every page of every site of the adapter's groups.

        Found while it is written, on whatever thread that is: hundreds of pages would take the engine a millisecond.
        """
        by_site: dict[int, dict[int, Delta]] = {}
        for delta in adapter.deltas:
            by_site.setdefault(delta.site, {})[delta.member] = delta
        for group, held in table.items():
            for index in self._layout.groups[group]:
                site, deltas = self._layout.sites[index], by_site.get(index, {})
                for order, page in enumerate(held):
                    yield PageCopy(self._sites[index], page, site, deltas, order * PAGE_RANK)
