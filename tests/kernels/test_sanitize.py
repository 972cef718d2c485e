"""The C kernels under the address and undefined-behaviour sanitizers, where the compiler has them."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_kernels_stay_within_their_memory(tmp_path):
    compiler = shutil.which("gcc")
    trial = tmp_path / "trial.c"
    trial.write_text("int main(void) { return 0; }\n")
    flags = ["-fsanitize=address,undefined", "-fopenmp"]
    if (
        not compiler
        or subprocess.run([compiler, *flags, trial, "-o", tmp_path / "trial"], check=False).returncode
    ):
        pytest.skip("no gcc with its sanitizers here")
    ran = subprocess.run(
        ["make", "--jobs=2", "sanitize"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "clean" in ran.stdout.splitlines()
