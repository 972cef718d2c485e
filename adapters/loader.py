"""Adapters in host memory: reads generations on threads of its own, keeps the recently used within a bound.

Knows nothing of names or of devices: `read` is given. `get` never waits; the engine asks again after
`on_ready`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, islice

from adapters.adapter import Adapter
from adapters.errors import AdapterError
from adapters.tally import Tally
from adapters.threads import compute_on

READ_AHEAD = 4  # how many of the line are read before anybody asks for them


class Loader:
    """A cache of adapters by generation: first out is who nobody waits for, least recently used first.

    The cached adapters never take more than `max_bytes`. One that is larger by itself is handed to the first
    `get` after its read and not kept; until that `get`, or a `forget`, it is memory beyond the bound.

    `line_up` says who waits, in order. Nobody's adapter is put out for one that is wanted less urgently, so that
    two which do not fit together cannot put each other out for ever: the later one is put off until it fits.
    """

    def __init__(
        self,
        read: Callable[[str], Adapter],
        max_bytes: int,
        on_ready: Callable[[], None],
        threads: int = 2,
    ) -> None:
        self._read = read
        self._max_bytes = max_bytes
        self._on_ready = on_ready
        # One thread each: helpers that a read leaves behind would count as busy with OpenMP, and from then on a step's
        # helpers would go to sleep between any two products.
        self._executor = ThreadPoolExecutor(threads, "adapter-loader", compute_on, (1,))
        self._lock = threading.Lock()
        self._cached: OrderedDict[str, Adapter] = OrderedDict()
        self._oversize: dict[str, Adapter] = {}
        self._loading: dict[str, object] = {}  # the ticket of the read under way; a stale one is dropped
        self._failed: dict[str, tuple[float, AdapterError]] = {}  # and when the read began
        self._wanted: dict[str, int] = {}  # generation to its place in the line
        self._sizes: dict[str, int] = {}  # bytes of those in the line that have been read before
        self._ahead: dict[str | None, int] = {}  # held for those ahead of each; empty: to be summed up again
        self._nbytes = 0
        self.load_seconds = Tally()  # of reads that ended well
        self._failures = 0
        self._evictions = 0
        self._closed = False

    @property
    def failures(self) -> int:
        """Reads that did not."""
        return self._failures

    @property
    def evictions(self) -> int:
        """Adapters put out of the cache to make room."""
        return self._evictions

    @property
    def cached(self) -> int:
        """Adapters in the cache."""
        return len(self._cached)

    @property
    def nbytes(self) -> int:
        """Bytes of the cached adapters."""
        return self._nbytes

    def line_up(self, generations: Iterable[str]) -> None:
        """Who waits for its adapter now, the most urgent first; what was said before is forgotten."""
        with self._lock:
            self._wanted = {generation: place for place, generation in enumerate(dict.fromkeys(generations))}
            self._sizes = {name: size for name in self._wanted if (size := self._size(name))}
            self._ahead.clear()

    def read_ahead(self) -> None:
        """Begin to read the first few in the line that are not here and fit; nothing is handed out, nor any error."""
        with self._lock:
            for generation in islice(self._wanted, READ_AHEAD):
                if not any(generation in held for held in (self._cached, self._oversize, self._failed)):
                    self._begin(generation)

    def get(self, generation: str, since: float = 0.0) -> Adapter | None:
        """The weights if they are here; else None, and a read is under way, or put off until it fits.

        Raises the error of a read that failed, once: the next call starts another.
        """
        with self._lock:
            assert not self._closed, "the loader is closed"
            if generation in self._cached:
                self._cached.move_to_end(generation)
                return self._cached[generation]
            if generation in self._oversize:
                return self._oversize.pop(generation)
            if generation in self._failed:
                began, error = self._failed.pop(generation)
                if began >= since:  # else it was read for somebody who has left
                    raise error
            self._begin(generation)
            return None

    def forget(self, generation: str) -> None:
        """Drop whatever is held of a generation; a read under way ends unheard."""
        with self._lock:
            adapter = self._cached.pop(generation, None)
            self._nbytes -= adapter.nbytes if adapter else 0
            self._oversize.pop(generation, None)
            self._failed.pop(generation, None)
            self._loading.pop(generation, None)
            self._sizes.pop(generation, None)
            self._ahead.clear()

    def close(self) -> None:
        """End the threads, after the reads that have begun."""
        with self._lock:
            self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)

    def check(self) -> None:
        """The bound holds, the books agree, and a generation is in one place at a time."""
        with self._lock:
            assert self._nbytes == sum(adapter.nbytes for adapter in self._cached.values())
            assert 0 <= self._nbytes <= self._max_bytes
            assert all(adapter.nbytes > self._max_bytes for adapter in self._oversize.values())
            places = [*self._cached, *self._oversize, *self._loading, *self._failed]
            assert len(places) == len(set(places)), "a generation is in two places"
            assert self._sizes.keys() <= self._wanted.keys(), "the size of one that nobody waits for is kept"
            assert all(key == adapter.generation for key, adapter in self._cached.items())

    def _begin(self, generation: str) -> None:
        """Have it read, unless that is under way or it is known not to fit; the lock is held."""
        size = self._sizes.get(generation)
        if generation not in self._loading and (size is None or size <= self._room_for(generation)):
            ticket = self._loading[generation] = object()
            self._ahead.clear()
            self._executor.submit(self._load, generation, ticket)

    def _load(self, generation: str, ticket: object) -> None:
        started = time.perf_counter()
        try:
            result: Adapter | AdapterError = self._read(generation)
        except AdapterError as error:
            result = error
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            result = AdapterError(
                "adapter_load_failed", f"generation {generation} could not be read: {problem}"
            )
            result.__cause__ = error
        seconds = time.perf_counter() - started
        with self._lock:
            if isinstance(result, AdapterError):
                self._failures += 1
            else:
                self.load_seconds.add(seconds)
            if self._loading.get(generation) is ticket:
                del self._loading[generation]
                self._settle(generation, result, started)
                self._ahead.clear()
        self._on_ready()

    def _settle(self, generation: str, result: Adapter | AdapterError, began: float) -> None:
        """File a read's result; the lock is held."""
        if isinstance(result, AdapterError):
            self._failed[generation] = began, result
            return
        if result.nbytes > self._max_bytes:
            self._oversize[generation] = result
            return
        if generation in self._wanted:
            self._sizes[generation] = result.nbytes
        if result.nbytes > self._room_for(generation):
            return
        while self._nbytes + result.nbytes > self._max_bytes:
            self._nbytes -= self._cached.pop(self._least_wanted()).nbytes
            self._evictions += 1
        self._cached[generation] = result
        self._nbytes += result.nbytes

    def _size(self, generation: str) -> int | None:
        """Its bytes, if they are known."""
        known = self._sizes.get(generation)
        cached = self._cached.get(generation)
        return cached.nbytes if known is None and cached else known

    def _room_for(self, generation: str) -> int:
        """Bytes that it may have: all but those of more urgent ones that are cached or being read again."""
        if not self._ahead:
            self._ahead = self._sum_up()
        return self._max_bytes - self._ahead[generation if generation in self._wanted else None]

    def _sum_up(self) -> dict[str | None, int]:
        """Bytes held for those ahead of each in the line, and for all of them under None."""
        held = (
            self._sizes.get(name, 0) if name in self._cached or name in self._loading else 0
            for name in self._wanted
        )
        return dict(zip((*self._wanted, None), accumulate(held, initial=0), strict=True))

    def _least_wanted(self) -> str:
        """Whom to put out: who is not waited for, or else who is last in the line; of equals the longest unused."""
        nobody = len(self._wanted)
        return max(self._cached, key=lambda generation: self._wanted.get(generation, nobody))
