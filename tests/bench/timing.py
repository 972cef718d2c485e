"""How long one operation takes, and how fast memory is read: the floor of whatever has to read its weights."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

READ_FLOATS = 400_000_000  # 1.6 GB: no cache holds it


def seconds(function: Callable[[Tensor], object], x: Tensor) -> float:
    """Of one call. One thread is timed by its own CPU time, which other processes on the machine disturb less."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    function(x)
    return clock() - began


def read_bandwidth() -> float:
    """Bytes per second: the best of five reads of a vector that no cache holds, on all of torch's threads."""
    vector = torch.ones(READ_FLOATS)
    return vector.nbytes / min(seconds(torch.sum, vector) for _ in range(5))
