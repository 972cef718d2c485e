"""No request waits for the compiler: whatever kernels a step needs were compiled before the server was ready."""

import pytest

from tests.triton.variants import MODES, late_variants


@pytest.mark.parametrize("mode", MODES)
def test_requests_need_no_kernel_that_was_not_compiled_before(mode):
    found = late_variants(mode)
    assert found["early"] > 40
    assert found["late"] == {}
