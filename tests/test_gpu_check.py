"""What `make gpu-check` says of a run that failed, which may be all that is seen of it."""

from tests.gpu.check import _what_failed

SAID = """\
=================================== FAILURES ===================================
_________________________ test_a_norm[shape0-dtype0] _________________________
    def test_a_norm(shape, dtype):
>       assert rows.rms_norm(x, weight, 1e-5) is None
E       assert 0.5 <= 2e-06
E        +  where 0.5 = relative_error(...)
tests/triton/test_rows.py:20: AssertionError
_ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _
_________________________ test_a_norm[shape1-dtype0] _________________________
E       assert 0.5 <= 2e-06
E        +  where 0.5 = relative_error(...)
____________________ ERROR at setup of test_a_gate _____________________
E       RuntimeError: no kernel image
=========================== short test summary info ============================
FAILED tests/triton/test_rows.py::test_a_norm[shape0-dtype0] - assert 0.5 <= 2e-06
ERROR tests/triton/test_rows.py::test_a_gate - RuntimeError: no kernel image
2 failed, 1 error in 3.00s
"""


def test_each_error_is_said_once_below_its_tests():
    assert _what_failed(SAID) == [
        "test_a_norm[shape0-dtype0]",
        "test_a_norm[shape1-dtype0]",
        "E       assert 0.5 <= 2e-06",
        "E        +  where 0.5 = relative_error(...)",
        "ERROR at setup of test_a_gate",
        "E       RuntimeError: no kernel image",
        "FAILED tests/triton/test_rows.py::test_a_norm[shape0-dtype0] - assert 0.5 <= 2e-06",
        "ERROR tests/triton/test_rows.py::test_a_gate - RuntimeError: no kernel image",
    ]
    assert _what_failed("38 passed in 4.00s\n") == []
