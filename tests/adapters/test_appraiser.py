"""What an adapter is worth: the same at its upload, after a restart and when it is read."""

from __future__ import annotations

import pytest
import torch

from adapters.appraiser import Appraiser
from adapters.peft_format import copied, mapped
from tests.adapters.samples import make_layout, make_tensors, write_folder


@pytest.mark.parametrize("keep", [copied, mapped])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_size_that_must_fit_is_that_of_what_is_read(tmp_path, keep, stored, dtype):
    folder = write_folder(
        tmp_path, tensors={name: values.to(stored) for name, values in make_tensors().items()}
    )
    sizes: list[int] = []
    appraiser = Appraiser(make_layout(), dtype, 64, lambda adapter: sizes.append(adapter.nbytes), keep)
    facts = appraiser.validate(folder, "g")
    assert appraiser.inspect(folder, "g") == facts
    assert sizes == [appraiser.read(folder, "g").nbytes] * 2
