"""The C kernels under the address and undefined-behaviour sanitizers, where the compiler has them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def _sanitizers(tmp_path_factory):
    folder, compiler = tmp_path_factory.mktemp("trial"), shutil.which("gcc")
    (folder / "trial.c").write_text("int main(void) { return 0; }\n")
    flags = ["-fsanitize=address,undefined", "-fopenmp"]
    if (
        not compiler
        or subprocess.run(
            [compiler, *flags, folder / "trial.c", "-o", folder / "trial"], check=False
        ).returncode
    ):
        pytest.skip("no gcc with its sanitizers here")


@pytest.mark.usefixtures("_sanitizers")
def test_the_kernels_stay_within_their_memory():
    own = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    made = subprocess.run(
        ["make", "--jobs=2", "sanitize"], cwd=ROOT, env=own, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-3000:]
    assert "clean" in made.stdout.splitlines()
