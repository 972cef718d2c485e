"""These tests need a CUDA device: without one they are skipped, or fail with `--require-cuda`."""

import importlib.util

import pytest
import torch

collect_ignore_glob = (
    [] if importlib.util.find_spec("triton") else ["test_*.py"]
)  # a CPU install has no Triton


@pytest.fixture(autouse=True, scope="session")
def _cuda(request):
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
        return
    if request.config.getoption("--require-cuda"):
        pytest.exit("no CUDA device answers here: run this on a machine with an NVIDIA GPU", returncode=1)
    pytest.skip("no CUDA device here")
