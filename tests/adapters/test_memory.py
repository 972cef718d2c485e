"""Memory that is taken when it is written: zeros of the right shape, each its own."""

from __future__ import annotations

import pytest
import torch

from adapters.memory import zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 5), (4, 0, 2)])
def test_zeros_that_can_be_written(shape, dtype):
    one, two = zeros(shape, dtype, "cpu"), zeros(shape, dtype, torch.device("cpu"))
    assert (one.shape, one.dtype, one.is_contiguous()) == (shape, dtype, True)
    assert not one.any()
    one.fill_(2)
    assert one.eq(2).all()
    assert not two.any()


def test_other_devices_make_their_own():
    assert zeros((2,), torch.float32, "meta").is_meta
