"""Is everything right on this machine's GPU? Kernels, steps, the engine and the whole server, each on its own.

    python -m tests.gpu.check

Ends with a line per part, `check NAME ok|failed`; exits 1 when any failed, or when no CUDA device answers.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import torch

ROOT = Path(__file__).parents[2]
# What is tested, and by how many processes: Triton compiles a kernel for each shape, one at a time in each.
TESTS = {
    "products": (("tests/gpu/test_nf4.py", "tests/gpu/test_products.py"), 5),
    "kernels": (("tests/triton",), 5),
    "steps": (("tests/gpu/test_steps.py",), 3),
    "engine": (("tests/gpu/test_cuda.py",), 4),
}
SMOKE = ("-m", "loadtests.smoke", "--device", "cuda", "--max-num-seqs", "8", "--max-lora-rank", "16")
SECONDS = 300  # for all of it


def main() -> int:
    """Run every part, whatever becomes of the others."""
    if not torch.cuda.is_available():
        print("no CUDA device answers here: run this on a machine with an NVIDIA GPU", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    results = parts()
    for name, good in results.items():
        print(f"check {name} {'ok' if good else 'failed'}")
    return 0 if all(results.values()) else 1


def parts() -> dict[str, bool]:
    """The tests and the server beside each other: what all of them wait for is the compiler, on a core each."""
    environment = os.environ | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS is not deterministic, and torch refuses
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the machine's own are not ours
    }
    began, results = time.perf_counter(), {}
    with ExitStack() as stack:
        commands = {name: _pytest(*part) for name, part in TESTS.items()} | {"smoke": SMOKE}
        said = {name: stack.enter_context(tempfile.TemporaryFile("w+")) for name in commands}
        running = {name: _start(command, said[name], environment) for name, command in commands.items()}
        for name, process in running.items():
            results[name] = _ends_well(process, began + SECONDS)
            said[name].seek(0)
            text = said[name].read()
            print(f"--- {name}, after {time.perf_counter() - began:.0f} s", *_what_failed(text), sep="\n")
            print(text[-6000:], flush=True)
    return results


def _what_failed(text: str) -> list[str]:
    """Of pytest's output: each assertion or error once, below the tests that ended with it; then the failures' list."""
    ends: dict[str, list[str]] = {}  # a test's title to what it ended with
    title = ""
    for line in text.splitlines():
        if found := re.fullmatch(r"_{2,} (.+) _{2,}", line):
            title = found[1]
        elif line.startswith("E  "):
            ends.setdefault(title, []).append(line[:300])
    tests_by_end: dict[tuple[str, ...], list[str]] = {}
    for title, end in ends.items():
        tests_by_end.setdefault(tuple(end), []).append(title)
    lines = [line for end, titles in tests_by_end.items() for line in (*titles, *end)]
    return lines + [line[:300] for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]


def _pytest(paths: Sequence[str], processes: int) -> tuple[str, ...]:
    beside = ("-p", "xdist.plugin", "-n", str(processes)) if importlib.util.find_spec("xdist") else ()
    return ("-m", "pytest", *paths, "--require-cuda", "-W", "default", "--durations", "3", *beside)


def _start(
    arguments: Sequence[str], output: IO[str], environment: Mapping[str, str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _ends_well(process: subprocess.Popen[str], deadline: float) -> bool:
    try:
        return process.wait(max(1.0, deadline - time.perf_counter())) == 0
    except subprocess.TimeoutExpired:
        print(f"{' '.join(map(str, process.args))}: not done in time", flush=True)  # type: ignore[arg-type]
        process.send_signal(signal.SIGINT)  # at which pytest says what failed so far
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False


if __name__ == "__main__":
    sys.exit(main())
