"""One forward pass at a time."""

import pytest
import torch

from kernels.segments import Spans
from server.model.context import ForwardContext, current_context, forward_context

CONTEXT = ForwardContext(torch.empty(0), Spans((), 16, torch.device("cpu")), {}, ())


def test_held_within_and_gone_after():
    assert current_context() is None
    with forward_context(CONTEXT):
        assert current_context() is CONTEXT
    assert current_context() is None


def test_refuses_to_nest():
    with forward_context(CONTEXT):
        with pytest.raises(AssertionError, match="inside another"), forward_context(CONTEXT):
            pass
        assert current_context() is CONTEXT


def test_gone_after_an_error():
    with pytest.raises(ValueError, match="oops"), forward_context(CONTEXT):
        raise ValueError("oops")
    assert current_context() is None
