"""Pages written on a GPU while it runs steps: rows go to pinned memory on a thread, from there on a stream of its own.

Nothing waits for it: the pool asks whether a copy has ended. Host memory is taken once, in slots of a few pages each.
Pages are sent one by one, so that a step's own small copy to the device never waits for more than one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, cuda

from adapters.adapter import Site
from adapters.page_copy import Page, PageCopy, SitePages, write
from adapters.threads import compute_on

SLOTS = 2  # one is filled while the other is sent
SLOT_PAGES = 8  # filled and sent in one call each


class _Room:
    """Pinned memory for one page of any site."""

    def __init__(self, nbytes: int) -> None:
        pinned = cuda.is_available()  # else there is nothing to copy to, and a test runs this
        self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._known: dict[tuple[int, ...], tuple[Page, list[Tensor]]] = {}  # by the site's widths

    def page_of(self, pages: SitePages, site: Site) -> tuple[Page, list[Tensor]]:
        """The memory as a page of these: by member, to be filled, and as whole tensors, to be sent."""
        widths = (site.in_features, *[member.out_features for member in site.members])
        if widths not in self._known:
            start, parts = 0, []
            for tensor in pages.tensors:
                end = start + tensor[0].nbytes
                parts.append(self._memory[start:end].view(tensor.dtype).view(tensor.shape[1:]))
                start = end
            whole = SitePages(*(part[None] for part in parts))
            self._known[widths] = Page.of(whole, 0, site), parts
        return self._known[widths]


class _Slot:
    """Rooms that are filled and sent together, and the event after which they may be filled again."""

    def __init__(self, nbytes: int) -> None:
        self.rooms = [_Room(nbytes) for _ in range(SLOT_PAGES)]
        self.free = cuda.Event(blocking=True)


class SideStream:
    """A thread and a stream that write pages. `on_done` is called, on the thread, after each adapter."""

    def __init__(self, sites: Sequence[SitePages], on_done: Callable[[], None]) -> None:
        largest = max(sum(tensor[0].nbytes for tensor in pages.tensors) for pages in sites)
        self._slots = [_Slot(largest) for _ in range(SLOTS)]
        self._next = itertools.cycle(self._slots)
        self._stream = cuda.Stream(sites[0].a.device)
        self._on_done = on_done
        self._executor = ThreadPoolExecutor(1, "adapter-copier", compute_on, (1,))

    def copy(self, copies: Iterable[PageCopy]) -> Future[float]:
        """Begin to write. Called by the thread that runs steps: what it has launched may still read these pages."""
        launched = cuda.Event()
        launched.record()
        future = self._executor.submit(self._write, copies, launched)
        future.add_done_callback(lambda _: self._on_done())
        return future

    def close(self) -> None:
        """End the thread, after what has begun."""
        self._executor.shutdown(wait=True)

    def _write(self, copies: Iterable[PageCopy], launched: cuda.Event) -> float:
        started = time.perf_counter()
        with cuda.stream(self._stream):
            self._stream.wait_event(launched)
            rest = iter(copies)
            while batch := list(itertools.islice(rest, SLOT_PAGES)):
                _send(batch, next(self._next))
            written = cuda.Event(blocking=True)
            written.record()
        written.synchronize()
        return time.perf_counter() - started


def _send(copies: Sequence[PageCopy], slot: _Slot) -> None:
    """Fill a slot with pages, and have the present stream take them to their places."""
    slot.free.synchronize()
    staged = [room.page_of(copy.pages, copy.site) for copy, room in zip(copies, slot.rooms, strict=False)]
    write((copy, page) for copy, (page, _) in zip(copies, staged, strict=True))
    places = [tensor[copy.page] for copy in copies for tensor in copy.pages.tensors]
    torch._foreach_copy_(places, [part for _, parts in staged for part in parts], non_blocking=True)
    slot.free.record()
