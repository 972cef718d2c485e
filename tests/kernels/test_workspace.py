"""What a workspace promises to kernels and to captured graphs."""

import pytest
import torch

from kernels.workspace import Workspace


def test_gives_the_same_memory_until_it_must_grow():
    workspace = Workspace("cpu")
    first = workspace.planes(100)
    assert workspace.planes(40).data_ptr() == first.data_ptr()
    grown = workspace.planes(101)
    assert grown.numel() >= 101
    assert workspace.planes(100).data_ptr() == grown.data_ptr()
    assert workspace.held == (100 + 101) * 4  # a graph may still read the first


def test_counters_are_zero_and_checked():
    workspace = Workspace("cpu")
    counters = workspace.counters(9)
    assert not counters.any()
    workspace.check()
    counters[3] = 1
    with pytest.raises(AssertionError, match="behind"):
        workspace.check()


def test_scratch_takes_any_dtype():
    workspace = Workspace("cpu")
    wide = workspace.scratch(3, 5, torch.float32)
    assert wide.shape == (3, 5)
    narrow = workspace.scratch(4, 7, torch.bfloat16)
    assert narrow.dtype is torch.bfloat16
    assert narrow.data_ptr() == wide.data_ptr()


def test_does_not_grow_inside_a_captured_graph(monkeypatch):
    workspace = Workspace("cpu")
    workspace.planes(8)
    monkeypatch.setattr(workspace, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert workspace.planes(8).numel() == 8
    with pytest.raises(RuntimeError, match="run the step once before"):
        workspace.planes(9)
