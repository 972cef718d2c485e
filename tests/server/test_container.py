"""Limits of control groups, of both versions, at the process' own group or above it; laid out as the kernel does."""

import pytest
import torch

from server.config_values import GIB
from server.container import cpus, memory_left
from server.memory_plan import Free, free_memory

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "proc/meminfo", "MemTotal:  67108864 kB\nMemFree:  1 kB\nMemAvailable:  33554432 kB\n")
    return tmp_path


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def version_2(root, path, limit, used=0, inactive=0):
    folder = f"sys/fs/cgroup{path}"
    write(root, f"{folder}/memory.max", f"{limit}\n")
    write(root, f"{folder}/memory.current", f"{used}\n")
    write(root, f"{folder}/memory.stat", f"anon 5\ninactive_file {inactive}\n")


def version_1(root, path, limit, used=0, inactive=0):
    folder = f"sys/fs/cgroup/memory{path}"
    write(root, f"{folder}/memory.limit_in_bytes", f"{limit}\n")
    write(root, f"{folder}/memory.usage_in_bytes", f"{used}\n")
    write(root, f"{folder}/memory.stat", f"inactive_file 7\ntotal_inactive_file {inactive}\n")


def test_a_container_of_version_2_sees_its_own_group_at_the_top(root):
    write(root, "proc/self/cgroup", "0::/\n")
    version_2(root, "", 4 * GIB, used=2 * GIB, inactive=GIB)
    assert memory_left(root) == 3 * GIB
    assert free_memory(CPU, root) == (Free(3 * GIB, " within the container's limit"), 64 * GIB)


def test_a_container_of_version_1_is_told_a_path_that_it_cannot_see(root):
    write(
        root, "proc/self/cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/x\n0::/\n"
    )
    version_1(root, "", 4 * GIB, used=3 * GIB, inactive=2 * GIB)
    assert memory_left(root) == 3 * GIB


@pytest.mark.parametrize(("line", "lay"), [("0::", version_2), ("4:memory:", version_1)])
def test_the_nearest_limit_of_all_groups_above_counts(root, line, lay):
    write(root, "proc/self/cgroup", f"{line}/slice/pod/service\n")
    lay(root, "/slice/pod/service", 8 * GIB, used=GIB)
    lay(root, "/slice", 6 * GIB, used=4 * GIB, inactive=GIB // 2)
    lay(root, "/other", GIB)
    assert memory_left(root) == 2.5 * GIB


def test_what_is_used_beyond_the_limit_is_nothing_left(root):
    write(root, "proc/self/cgroup", "0::/a\n")
    version_2(root, "/a", GIB, used=2 * GIB)
    assert memory_left(root) == 0


@pytest.mark.parametrize(("lay", "none"), [(version_2, "max"), (version_1, 2**63 - 4096)])
def test_no_limit_leaves_what_the_machine_has(root, lay, none):
    write(root, "proc/self/cgroup", "4:memory:/a\n0::/a\n")
    lay(root, "/a", none)
    assert free_memory(CPU, root) == (Free(32 * GIB), 64 * GIB)


def test_without_control_groups_there_are_no_limits(root):
    assert memory_left(root) is cpus(root) is None
    assert free_memory(CPU, root) == (Free(32 * GIB), 64 * GIB)


@pytest.mark.parametrize(
    ("quota", "count"),
    [("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("max 100000", None)],
)
def test_cpus_are_the_quota_by_the_period_rounded_up(root, quota, count):
    write(root, "proc/self/cgroup", "0::/a/b\n")
    write(root, "sys/fs/cgroup/a/cpu.max", f"{quota}\n")
    write(root, "sys/fs/cgroup/a/b/cpu.max", "max 100000\n")
    assert cpus(root) == count


@pytest.mark.parametrize(("quota", "count"), [(250000, 3), (-1, None)])
def test_cpus_of_version_1(root, quota, count):
    write(root, "proc/self/cgroup", "5:cpu,cpuacct:/docker/abc\n")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert cpus(root) == count
