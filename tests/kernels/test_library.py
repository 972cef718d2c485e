"""The compiled kernels: built wherever there is a compiler, one OpenMP with torch, each instruction set by name."""

import shutil
from pathlib import Path

import pytest
import torch

from kernels.cpu import operations
from kernels.cpu.library import INSTRUCTION_SETS, library_path, load


@pytest.mark.skipif(
    shutil.which("gcc") is None and shutil.which("cc") is None,
    reason="no compiler here: plain PyTorch serves",
)
def test_where_there_is_a_compiler_the_kernels_are_built():
    assert library_path() is not None, "`make native` builds them"
    flags = Path("/proc/cpuinfo").read_text()
    best = "avx512" if "avx512vl" in flags else "avx2" if " avx2 " in flags else "portable"
    assert load().instruction_set == best


@pytest.fixture
def library():
    found = load()
    if found is None:
        pytest.skip("the kernels are not built here")
    return found


def test_torch_and_the_kernels_share_one_openmp(library):
    """Two of them would each keep a pool of threads, and fight over the cores."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = {path for path in mapped if "libgomp" in path or "libiomp" in path or "libomp" in path}
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("count", [1, 2])
def test_an_operation_runs_on_torchs_threads(library, count):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        assert operations.threads(library) == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_each_instruction_set_is_taken_by_name_or_refused(library, name):
    if name in INSTRUCTION_SETS[: library.isa + 1]:
        assert load(name).instruction_set == name
    else:
        with pytest.raises(ValueError, match=f"no {name}: the best it has is {library.instruction_set}"):
            load(name)


def test_no_library_is_said_by_none(monkeypatch):
    monkeypatch.setattr("kernels.cpu.library.EXTENSION_SUFFIXES", [".not-built"])
    assert load() is None


def test_byte_arithmetic_is_refused_without_its_instructions(library):
    flags = Path("/proc/cpuinfo").read_text()
    if "avx512_vnni" in flags or "avx_vnni" in flags:
        assert load(math="int8").math == "int8"
    else:
        with pytest.raises(ValueError, match="no dot product of bytes"):
            load(math="int8")
