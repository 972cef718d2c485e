"""Times work on a GPU: graphs replayed between two events, whole calls by the clock, and how fast memory copies.

On a CPU (a dry run) the same functions run everything once and time it by the clock; such numbers mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

ROTATED_BYTES = 200_000_000  # of weights that a timing walks over, so that no cache holds them


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(work: Callable[[], object], device: torch.device, *, turns: int = 5, replays: int = 10) -> float:
    """Seconds of `work`, captured once in a CUDA graph: the median over turns of the mean over replays."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    graph.replay()
    torch.cuda.synchronize(device)
    found = []
    for _ in range(turns):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(replays):
            graph.replay()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended) / 1e3 / replays)
    del graph
    return statistics.median(found)


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
    """Bytes read and written per second by a copy on the device."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / captured(lambda: target.copy_(source), device)


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
