"""Fresh memory is NaN in the kernels' tests: an operation that reads what nobody wrote cannot pass."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """torch fills uninitialized memory only while deterministic algorithms are asked for."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
