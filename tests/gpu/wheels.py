"""Gathers into build/wheels what an offline GPU machine lacks, for its Python and not for this one.

    python -m tests.gpu.wheels

Such a machine has Python 3.12, torch with CUDA 13.0, triton, transformers and peft, and what these need. From our own
requirements on, each wheel is fetched alone and its requirements are followed, so that the set is closed and nothing
the machine has (gigabytes of torch) is fetched. Of bitsandbytes only the library for CUDA 13.0 is kept.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "build" / "wheels"
MOST_BYTES = 40_000_000
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
ENVIRONMENT = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
    "os_name": "posix",
}
# What the machine has: the first line by itself, the rest because the first line needs it.
GIVEN = {"torch", "triton", "transformers", "peft", "accelerate", "numpy", "pip", "setuptools"}
GIVEN |= {
    "filelock",
    "fsspec",
    "hf-xet",
    "huggingface-hub",
    "jinja2",
    "markupsafe",
    "mpmath",
    "networkx",
    "packaging",
}
GIVEN |= {
    "psutil",
    "pyyaml",
    "regex",
    "safetensors",
    "sympy",
    "tokenizers",
    "tqdm",
    "typer",
    "typing-extensions",
}
WITH_EXTRAS = ("pytest", "hypothesis", "psutil")  # of our development requirements, what gpu-check runs
KEPT_LIBRARY = "libbitsandbytes_cuda130.so"


def main() -> int:
    """Fetch, strip, check; 0 when the set is closed and small enough."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    missing = our_requirements()
    fetched: set[str] = set()
    while missing:
        requirement = missing.pop()
        name = canonicalize_name(requirement.name)
        if name in fetched or name in GIVEN:
            continue
        fetched.add(name)
        missing += requirements_of(fetch(requirement))
    strip(next(WHEELS.glob("bitsandbytes-*.whl")))
    held = dict(parse_wheel_filename(path.name)[:2] for path in WHEELS.glob("*.whl"))
    lacking = {
        f"{path.name}: {requirement}"
        for path in WHEELS.glob("*.whl")
        for requirement in requirements_of(path)
        if (name := canonicalize_name(requirement.name)) not in GIVEN
        and (name not in held or not requirement.specifier.contains(held[name], prereleases=True))
    }
    size = sum(path.stat().st_size for path in WHEELS.glob("*.whl"))
    print(f"{len(held)} wheels for Python {PYTHON} in {WHEELS.relative_to(ROOT)}, {size / 1e6:.1f} MB")
    if lacking:
        print(f"gpu-wheels: not complete: {sorted(lacking)}", file=sys.stderr)
    if size >= MOST_BYTES:
        print(f"gpu-wheels: more than {MOST_BYTES / 1e6:.0f} MB", file=sys.stderr)
    return 1 if lacking or size >= MOST_BYTES else 0


def our_requirements() -> list[Requirement]:
    """What the server needs, and the checks that run on a GPU."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    development = [Requirement(text) for text in project["optional-dependencies"]["dev"]]
    wanted = [Requirement(text) for text in project["dependencies"]]
    wanted += [each for each in development if canonicalize_name(each.name) in WITH_EXTRAS]
    wanted.append(Requirement("pytest-xdist"))  # compiling for a GPU takes long, and many processes share it
    return [each for each in wanted if each.marker is None or each.marker.evaluate(ENVIRONMENT)]


def fetch(requirement: Requirement) -> Path:
    """One wheel, in the version that constraints.txt pins, without what it needs."""
    with tempfile.TemporaryDirectory(dir=WHEELS) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--python-version", PYTHON, "--implementation", "cp"]
        command += [part for platform in PLATFORMS for part in ("--platform", platform)]
        command += ["--dest", folder, "--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*command, f"{requirement.name}{requirement.specifier}"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        return Path(shutil.move(wheel, WHEELS / wheel.name))


def requirements_of(wheel: Path) -> list[Requirement]:
    """What a wheel says it needs on the machine, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    found = [Requirement(text) for text in said]
    return [
        each for each in found if each.marker is None or each.marker.evaluate(ENVIRONMENT | {"extra": ""})
    ]


def strip(wheel: Path) -> None:
    """Leave out every compiled library but the one for the machine's CUDA, and say so in the wheel's record."""
    made = wheel.with_suffix(".stripped")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target,
    ):
        (record,) = (name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        kept = [
            name
            for name in source.namelist()
            if name != record and (not name.endswith((".so", ".dll")) or name.endswith(KEPT_LIBRARY))
        ]
        assert any(name.endswith(KEPT_LIBRARY) for name in kept), f"{wheel.name} has no {KEPT_LIBRARY}"
        lines = []
        for name in kept:
            content = source.read(name)
            target.writestr(source.getinfo(name), content, zipfile.ZIP_DEFLATED, 9)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(content)}")
        target.writestr(record, "\n".join([*lines, f"{record},,"]) + "\n")
    made.replace(wheel)


if __name__ == "__main__":
    sys.exit(main())
