"""What this process' allocators keep of the memory that was freed. Knows nothing of who freed it."""

from __future__ import annotations

import ctypes
import gc
import logging
from contextlib import suppress

import torch

logger = logging.getLogger(__name__)

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def keep_large_blocks() -> None:
    """Tell glibc to reuse large blocks: returned to the system, each one page-faults again at every step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):  # another C library; its allocator has habits of its own
        logger.debug("no mallopt here")


def return_free_memory() -> None:
    """Give back what loading needed and serving does not: neither the limits above nor torch's own cache do it unasked.

    A memory plan asks a device what is free, and is not told of what torch keeps. Quantized weights that were joined
    are cycles (of module and weight), which only a collection ends.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
