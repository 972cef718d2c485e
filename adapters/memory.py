"""Zeroed tensors whose memory is taken when it is written, not when it is asked for.

A pool or a cache is sized for the worst day; filling gigabytes with zeros at start costs seconds and makes every page
resident. Knows nothing of what the tensors are for.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.zeros`; on the CPU from an anonymous mapping, which the system fills with zeros page by page."""
    if torch.device(device).type != "cpu" or math.prod(shape) == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    mapping = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)  # the tensor keeps it alive
    return torch.frombuffer(mapping, dtype=dtype).view(shape)
