"""Pages written on a GPU while it runs steps: rows go to pinned memory on a thread, from there on a stream of its own.

Nothing waits for it: the pool asks whether a copy has ended. Host memory is taken once, in a few slots of one page
each, so that no copy is longer than a page and a step's own small copy to the device never waits for more than that.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, cuda

from adapters.page_copy import PageCopy, SitePages
from adapters.threads import compute_on

SLOTS = 4


@dataclass(frozen=True, slots=True)
class _Slot:
    """Room for one page in pinned memory, and the event after which it may be written again."""

    memory: Tensor  # [bytes] uint8
    free: cuda.Event

    def as_page_of(self, pages: SitePages) -> SitePages:
        """The memory as a single page in the shape of these."""
        start, parts = 0, []
        for tensor in (pages.a, pages.b, pages.scale):
            end = start + tensor[0].nbytes
            parts.append(self.memory[start:end].view(tensor.dtype).view(1, *tensor.shape[1:]))
            start = end
        return SitePages(*parts)


class SideStream:
    """A thread and a stream that write pages. `on_done` is called, on the thread, after each adapter."""

    def __init__(self, sites: Sequence[SitePages], on_done: Callable[[], None]) -> None:
        largest = max(sum(t[0].nbytes for t in (pages.a, pages.b, pages.scale)) for pages in sites)
        pinned = cuda.is_available()  # else there is nothing to copy to, and a test runs this
        self._slots = [
            _Slot(torch.empty(largest, dtype=torch.uint8, pin_memory=pinned), cuda.Event(blocking=True))
            for _ in range(SLOTS)
        ]
        self._next = itertools.cycle(self._slots)
        self._stream = cuda.Stream(sites[0].a.device)
        self._on_done = on_done
        self._executor = ThreadPoolExecutor(1, "adapter-copier", compute_on, (1,))

    def copy(self, copies: Sequence[PageCopy]) -> Future[float]:
        """Begin to write. Called by the thread that runs steps: what it has launched may still read these pages."""
        launched = cuda.Event()
        launched.record()
        future = self._executor.submit(self._write, copies, launched)
        future.add_done_callback(lambda _: self._on_done())
        return future

    def close(self) -> None:
        """End the thread, after what has begun."""
        self._executor.shutdown(wait=True)

    def _write(self, copies: Sequence[PageCopy], launched: cuda.Event) -> float:
        started = time.perf_counter()
        with cuda.stream(self._stream):
            self._stream.wait_event(launched)
            for copy in copies:
                self._write_page(copy, next(self._next))
            written = cuda.Event(blocking=True)
            written.record()
        written.synchronize()
        return time.perf_counter() - started

    def _write_page(self, copy: PageCopy, slot: _Slot) -> None:
        slot.free.synchronize()
        staged = slot.as_page_of(copy.pages)
        copy.fill(staged, 0)
        copy.pages.a[copy.page].copy_(staged.a[0], non_blocking=True)
        copy.pages.b[copy.page].copy_(staged.b[0], non_blocking=True)
        copy.pages.scale[copy.page].copy_(staged.scale[0], non_blocking=True)
        slot.free.record()
