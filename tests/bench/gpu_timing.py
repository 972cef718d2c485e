"""Times work on a GPU: graphs replayed between two events, whole calls by the clock, and how fast memory copies.

An idle device lowers its clock (an H200 to 345 of 1980 MHz) and takes a while to raise it: whoever times something
wakes it first. On a CPU (a dry run) the same functions run everything once, by the clock; such numbers mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

ROTATED_BYTES = 200_000_000  # of weights that a timing walks over, so that no cache holds them
_WARM_SECONDS = 0.1  # of the very work, before it is timed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wake(device: torch.device, seconds: float = 1.0) -> None:
    """Large products until the clock is as high as it gets."""
    if device.type != "cuda":
        return
    square = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
    _busy(lambda: square @ square, device, seconds)


def captured(work: Callable[[], object], device: torch.device, *, turns: int = 5, replays: int = 10) -> float:
    """Seconds of `work`, captured once in a CUDA graph: the median over turns of the mean over replays."""
    if device.type != "cuda":
        return _by_the_clock(work)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    _busy(graph.replay, device, _WARM_SECONDS)
    found = _between_events(graph.replay, turns, replays)
    del graph
    return found


def _busy(work: Callable[[], object], device: torch.device, seconds: float) -> None:
    """At least once, and until so much time went by; a few at a time, so that no long queue is left."""
    began = time.perf_counter()
    while True:
        for _ in range(5):
            work()
        torch.cuda.synchronize(device)
        if time.perf_counter() - began > seconds:
            return


def _between_events(work: Callable[[], object], turns: int, calls: int) -> float:
    """Seconds of a call on the device: the median over turns of the mean over calls."""
    found = []
    for _ in range(turns):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(calls):
            work()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended) / 1e3 / calls)
    return statistics.median(found)


def _by_the_clock(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def called(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of a call, from an idle device to an idle device."""
    found = []
    for _ in range(rounds + 1):  # the first warms up
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes read and written per second by a copy on the device.

    Copies are launched as they come: a captured one goes to the copy engine, which gives 2.7 TB/s on an H200, where
    kernels that copy, add or sum reach 4.3 to 4.5.
    """
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    if device.type != "cuda":
        return 2 * nbytes / _by_the_clock(copy)
    wake(device)
    _busy(copy, device, _WARM_SECONDS)
    return 2 * nbytes / _between_events(copy, 5, 5)


def host_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes per second from pinned memory to the device."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return nbytes / called(lambda: target.copy_(source, non_blocking=True), device, 5)


def copies_of(nbytes: int, at_least: int = ROTATED_BYTES) -> int:
    """How many of such weights no cache holds."""
    return max(1, -(-at_least // nbytes))


def rotating(work: Callable[[int], Tensor], copies: int) -> Callable[[], None]:
    """One call for each copy of the weights."""

    def walk() -> None:
        for copy in range(copies):
            work(copy)

    return walk
