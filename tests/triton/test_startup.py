"""A GPU on whose machine Triton cannot launch kernels: it is said once, with a cure, and plain PyTorch serves."""

import logging

import pytest
import torch

from kernels import portable
from server.config import Settings, SettingsError
from server.kernel_choice import choose_kernels
from server.model.kernel_set import plain

CUDA = torch.device("cuda")


class NoCompiler:
    @property
    def active(self):
        raise RuntimeError("Failed to find C compiler.")


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(portable, "driver", NoCompiler())


def test_without_a_compiler_plain_pytorch_serves(caplog):
    with caplog.at_level(logging.WARNING):
        kernels = choose_kernels(Settings(model="x"), CUDA)
    assert kernels.name == plain().name
    assert not kernels.planned
    (said,) = [record.getMessage() for record in caplog.records]
    assert "Failed to find C compiler" in said
    assert "install gcc and Python's headers" in said


def test_without_a_compiler_batch_invariance_is_refused():
    with pytest.raises(SettingsError, match=r"without Triton: Failed .*install gcc"):
        choose_kernels(Settings(model="x", batch_invariant=True), CUDA)


def test_where_launches_are_possible_triton_serves(monkeypatch):
    monkeypatch.setattr(portable, "driver", type("Possible", (), {"active": object()}))
    monkeypatch.setattr("server.model.cuda.cuda_kernels", lambda device, *, fixed: (device, fixed))
    assert choose_kernels(Settings(model="x", batch_invariant=True), CUDA) == (CUDA, True)
