"""The kernels under Triton's interpreter: `make interpret` runs this folder, anything else skips it."""

import importlib.util

collect_ignore_glob: list[str] = []


def _interpreting() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


if not _interpreting():
    collect_ignore_glob.append("test_*.py")
