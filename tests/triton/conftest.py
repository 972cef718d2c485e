"""The kernels under Triton's interpreter: `make interpret` runs this folder, anything else skips it."""

import importlib.util

import pytest
import torch

collect_ignore_glob: list[str] = []


def _interpreting() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


if not _interpreting():
    collect_ignore_glob.append("test_*.py")


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """A kernel that reads what nobody wrote cannot pass: torch fills memory while deterministic algorithms are on."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
