"""The library for an instruction set: the built one, or one that emulates by SIMDe what this processor lacks."""

import fcntl
import functools
import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from kernels.cpu.library import InstructionSet, Library, Math, library_path, load

ROOT = Path(__file__).parents[3]
SIMDE = Path("/usr/include/simde/x86/avx512.h")  # Debian's libsimde-dev


def library(instruction_set: InstructionSet, math: Math = "fp32") -> Library:
    """Skips the test, with the reason, where neither can be had."""
    if library_path() is None:
        pytest.skip("the kernels are not built here")
    try:
        return load(instruction_set, math)
    except ValueError as lacking:
        missing = missing_for_emulation()
        if missing:
            pytest.skip(f"{lacking}, and {missing}")
        return load_emulated(instruction_set, math)


def missing_for_emulation() -> str | None:
    """What this machine lacks to emulate the rest, or None."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    if not {"avx2", "fma", "f16c"} <= flags:
        return "has no AVX2 to emulate it with"
    return None if SIMDE.exists() else "there is no SIMDe to emulate it with (Debian: libsimde-dev)"


def load_emulated(instruction_set: InstructionSet, math: Math = "fp32") -> Library:
    """The library in which every instruction is there, whatever the processor."""
    with mock.patch("kernels.cpu.library.library_path", built):
        return load(instruction_set, math)


@functools.cache
def built() -> Path:
    """Made once, and again when a source has changed."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the processes that test makes it, the others find it made
        return _make()


def _make() -> Path:
    quiet = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    made = subprocess.run(
        ["make", "--silent", "--jobs=2", "emulate"],
        cwd=ROOT,
        env=quiet,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return ROOT / "build" / "emulated.so"
