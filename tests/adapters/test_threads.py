"""A thread keeps its own number of helpers, whatever others set after it."""

from concurrent.futures import ThreadPoolExecutor

import torch

from adapters.threads import compute_on


def test_a_thread_keeps_its_number():
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            one.submit(compute_on, 3).result()
            other.submit(compute_on, 2).result()
            assert one.submit(torch.get_num_threads).result() == 3
            assert other.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
