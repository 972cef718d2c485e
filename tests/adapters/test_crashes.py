"""A process that dies at any file operation of a change: what is on disk is whole, and what was acknowledged stands."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.files import FileOps
from adapters.registry import Registry
from adapters.store import hash_folder
from tests.adapters.test_registry import Shop

ACKNOWLEDGED, KILLED, FAILED = 0, -signal.SIGKILL, 1
WAIT_SECONDS = 60.0


class Deadly(FileOps):
    """Kills its process at the n-th operation, before or after its effect; a write may end half done."""

    def __init__(self, kill_at: int, moment: str) -> None:
        self.kill_at, self.moment, self.count = kill_at, moment, 0

    def _step(self, act: Callable[[], None], half: Callable[[], object] = lambda: None) -> None:
        number, self.count = self.count, self.count + 1
        if number == self.kill_at and self.moment != "after":
            if self.moment == "half way":
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        act()
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def mkdir(self, path):
        self._step(lambda: FileOps.mkdir(self, path))

    def write(self, path, chunks):
        self._step(lambda: FileOps.write(self, path, chunks), lambda: path.write_bytes(b"half"))

    def copy(self, source, target):
        self._step(lambda: FileOps.copy(self, source, target), lambda: target.write_bytes(b"half"))

    def sync_file(self, path):
        self._step(lambda: FileOps.sync_file(self, path))

    def sync_folder(self, path):
        self._step(lambda: FileOps.sync_folder(self, path))

    def replace(self, source, target):
        self._step(lambda: FileOps.replace(self, source, target))

    def unlink(self, path):
        self._step(lambda: FileOps.unlink(self, path))

    def remove_tree(self, path):
        self._step(lambda: FileOps.remove_tree(self, path), lambda: shutil.rmtree(path, ignore_errors=True))


Change = Callable[[Path, Registry], object]
CHANGES: dict[str, Change] = {
    "upload": lambda root, registry: registry.put_archive("fresh", root / "archive"),
    "swap": lambda root, registry: registry.put_archive("legal", root / "archive"),
    "rollback": lambda root, registry: registry.rollback("legal", 1),
    "delete": lambda root, registry: registry.delete("legal"),
}


def run_and_die(root: Path, change: Change, kill_at: int, moment: str) -> int:
    """Carry out the change in a process of its own; how that process ended."""
    child = os.fork()
    if child == 0:
        try:
            files = Deadly(-1, moment)  # opening the store is another test's concern
            shop = Shop(root, keep_versions=1, files=files)
            files.count, files.kill_at = 0, kill_at
            change(root, shop.registry)
            os._exit(ACKNOWLEDGED)
        except BaseException:
            os._exit(FAILED)
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def state(shop: Shop) -> dict[str, str]:
    return {entry.name: entry.generation for entry in shop.registry.entries()}


@pytest.mark.parametrize("moment", ["before", "half way", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_killed_at_every_operation(original, tmp_path, name, moment):
    change = CHANGES[name]
    whole = tmp_path / "whole"
    shutil.copytree(original, whole)
    before_shop = Shop(whole, keep_versions=1)
    before = state(before_shop)
    change(whole, before_shop.registry)
    after = state(before_shop)
    before_shop.store.close()
    assert after != before

    seen = set()
    for number in range(100):
        root = tmp_path / str(number)
        shutil.copytree(original, root)
        ended = run_and_die(root, change, number, moment)
        assert ended != FAILED
        shop = Shop(root, keep_versions=1)
        found = state(shop)
        assert found in (before, after), f"operation {number} left neither the old state nor the new"
        if ended == ACKNOWLEDGED:
            assert found == after, "an acknowledged change is gone"
        for entry in shop.registry.entries():
            assert entry.state == "ready"
            assert hash_folder(shop.store.folder(entry.generation)) == entry.generation
            shop.registry.read(entry.generation)
        assert shop.store.files.names(shop.store.root / "incoming") == []
        shop.registry.check()
        shop.store.close()
        seen.add(found == after)
        if ended == ACKNOWLEDGED:
            break
    assert ended == ACKNOWLEDGED, "the change has more operations than were tried"
    assert number >= 3
    assert True in seen
    assert False in seen or (name, moment) == ("delete", "after"), "a delete begins with what makes it so"
