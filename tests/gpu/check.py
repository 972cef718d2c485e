"""Is everything right on this machine's GPU? Kernels, steps, the engine and the whole server, each on its own.

    python -m tests.gpu.check

Ends with a line per part, `check NAME ok|failed`; exits 1 when any failed, or when no CUDA device answers.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PARTS = {  # what is run, and by how many processes: Triton compiles a kernel for each shape, one at a time
    "products": (
        [
            "-m",
            "pytest",
            "tests/gpu/test_nf4.py",
            "tests/gpu/test_products.py",
            "tests/triton/test_nf4.py",
            "--require-cuda",
        ],
        8,
    ),
    "kernels": (
        [
            "-m",
            "pytest",
            "tests/triton/test_lora.py",
            "tests/triton/test_attention.py",
            "tests/triton/test_rows.py",
        ],
        8,
    ),
    "steps": (["-m", "pytest", "tests/gpu/test_steps.py", "--require-cuda"], 4),
    "engine": (["-m", "pytest", "tests/gpu/test_cuda.py", "--require-cuda"], 6),
    "smoke": (["-m", "loadtests.smoke", "--device", "cuda"], 1),
}
SECONDS = 150  # for one part


def main() -> int:
    """Run every part, whatever becomes of the others."""
    if not torch.cuda.is_available():
        print("no CUDA device answers here: run this on a machine with an NVIDIA GPU", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "4",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "HF_HUB_OFFLINE": "1",
    }
    results = {}
    for name, (command, processes) in PARTS.items():
        if processes > 1 and importlib.util.find_spec("xdist"):
            command = [*command, "-n", str(processes)]
        began = time.perf_counter()
        try:
            code = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, check=False, timeout=SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: not done after {SECONDS} s", flush=True)
            code = 1
        results[name] = code == 0
        print(f"{name} took {time.perf_counter() - began:.0f} s", flush=True)
    for name, good in results.items():
        print(f"check {name} {'ok' if good else 'failed'}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
