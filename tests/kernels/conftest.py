"""Who computes, on how many threads; and fresh memory is NaN."""

import pytest
import torch

from kernels.cpu.library import INSTRUCTION_SETS
from tests.kernels import emulation
from tests.kernels.fresh_memory import fresh_memory_is_nan as fresh_memory_is_nan


@pytest.fixture(params=["reference", *INSTRUCTION_SETS])
def kernels(request):
    """None for plain PyTorch, else the compiled library for one instruction set."""
    return None if request.param == "reference" else emulation.library(request.param)


@pytest.fixture(params=[1, 2])
def threads(request):
    """As many threads of torch's, and so of the library's, while a test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
