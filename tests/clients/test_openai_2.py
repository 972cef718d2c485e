"""The client of the generation before passes the same tests, in a process whose path begins with it."""

import os
import subprocess
import sys
from pathlib import Path

import openai

OLDER = Path(sys.prefix) / "openai-2"
HERE = Path(__file__).parent


def test_the_tests_here_are_run_with_the_newest_client():
    assert openai.VERSION.partition(".")[0] == "3"


def test_the_generation_before(url):
    assert OLDER.is_dir(), "make install puts it there"
    modules = [str(path) for path in sorted(HERE.glob("test_openai*.py")) if path != Path(__file__)]
    path = os.pathsep.join([str(OLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--openai=2",
            f"--served-at={url}",
            *modules,
        ],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
