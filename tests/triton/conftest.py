"""The kernels under Triton's interpreter (`make interpret`), or on a GPU where one answers (`make gpu-check`).

Anything else skips this folder. On a GPU tensors are made there unless a test says otherwise.
"""

import importlib.util

import pytest
import torch

from tests.kernels.fresh_memory import fresh_memory_is_nan as fresh_memory_is_nan

collect_ignore_glob: list[str] = []
ON_THE_CPU = (
    "test_*machine_code.py",
    "test_server.py",
    "test_layer.py",
    "test_bench.py",
    "test_nf4.py",
)  # the last has a twin there


def _interpreting() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _on_a_gpu() -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


if not _interpreting():
    collect_ignore_glob += ON_THE_CPU if _on_a_gpu() else ["test_*.py"]


@pytest.fixture(autouse=True)
def _where_the_kernels_run(request, fresh_memory_is_nan):
    if _interpreting():
        yield
        return
    if any(request.path.match(name) for name in ON_THE_CPU):  # a file that is named is not ignored
        pytest.skip("runs on the CPU, under Triton's interpreter")
    with torch.device("cuda"):
        yield
