"""Carries events from the engine's thread to the coroutines that wait for them.

One queue per request, one call into the event loop per step. Knows nothing of what the events mean.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable

from server.engine.messages import Event

_Queue = asyncio.Queue[Event]


class Streams:
    """The open streams by request id; opened and closed on event loops, fed from the engine's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[asyncio.AbstractEventLoop, _Queue]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request_id: str) -> _Queue:
        """A queue for the running event loop; the id must not be open already."""
        queue: _Queue = asyncio.Queue()
        with self._lock:
            assert request_id not in self._open, f"request id {request_id} is in use"
            self._open[request_id] = (asyncio.get_running_loop(), queue)
        return queue

    def close(self, request_id: str) -> None:
        with self._lock:
            del self._open[request_id]

    def ids(self) -> list[str]:
        with self._lock:
            return list(self._open)

    def deliver(self, events: Iterable[Event]) -> None:
        """Hand a step's events over; those of closed streams are dropped, their readers are gone."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Queue, Event]]] = {}
        with self._lock:
            for event in events:
                if event.request_id in self._open:
                    loop, queue = self._open[event.request_id]
                    by_loop.setdefault(loop, []).append((queue, event))
        for loop, pairs in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, pairs)


def _put_all(pairs: list[tuple[_Queue, Event]]) -> None:
    for queue, event in pairs:
        queue.put_nowait(event)
