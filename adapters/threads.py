"""How many threads torch computes on for one thread. Knows nothing of who computes what."""

from __future__ import annotations

import torch


def compute_on(count: int) -> None:
    """For the calling thread, whatever others set afterwards.

    torch gives a thread the number that any thread set last, at the first time that it is asked for the number: which
    is here.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()
