"""What the control groups that this process is in leave it: a container's or a service's limits on memory and CPUs.

A limit may be set at any group above as well, so all are looked at, of both versions of the kernel's interface. Knows
nothing of what the limits are for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes until the nearest limit, file pages that nobody uses counted as free; None where there is no limit."""
    left = []
    for group in _groups("memory", root):
        for limit, usage, inactive in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # no such file, or "max"
                most = int((group / limit).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / usage).read_text()) - int(stat.get(inactive, 0))
                left.append(max(0, most - used))
    return min(left, default=None)


def cpus(root: Path = ROOT) -> int | None:
    """How many CPUs may be busy at a time, rounded up; None where there is no limit."""
    quotas = []
    for group in _groups("cpu", root):
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quotas += [int(quota) / int(period)] if int(quota) > 0 else []  # -1 is no limit
    return math.ceil(min(quotas)) if quotas else None


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process' groups and of all above them, as far as they can be seen from here.

    In a container, a path may be told as it is outside; the mount's top is the container's own group then.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        parts = PurePosixPath(path).parts[1:]
        for depth in range(len(parts) + 1):
            yield top.joinpath(*parts[:depth])
