"""A process without torch that carries out changes of a store and dies at a file operation of each.

    python -m tests.adapters.doomed CHANGE MOMENT

Reads lines `NUMBER ROOT`; for each, a child carries out the change on the store in ROOT and is killed at operation
NUMBER. Answers how that child ended: 0 if it was done before. What adapters are worth is not looked at here: that
needs torch, and no file is changed by it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from adapters.entry import Facts
from adapters.files import FileOps
from adapters.registry import Registry
from adapters.store import Store

ACKNOWLEDGED, FAILED = 0, 1
WAIT_SECONDS = 60


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

    def protect(self, path):
        self._step(lambda: FileOps.protect(self, path))

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


def trusting() -> SimpleNamespace:
    """An appraiser that finds every adapter good."""
    return SimpleNamespace(inspect=lambda *_: Facts(), validate=lambda *_: Facts())


def die(root: Path, change: Change, kill_at: int, moment: str) -> int:
    """Carry out the change in a child; how that ended."""
    child = os.fork()
    if child == 0:
        signal.alarm(WAIT_SECONDS)  # one that hangs ends too, and not as was promised
        try:
            files = Deadly(-1, moment)  # opening the store is another test's concern
            registry = Registry(Store(root / "store", files), trusting(), keep_versions=1)
            files.count, files.kill_at = 0, kill_at
            change(root, registry)
            os._exit(ACKNOWLEDGED)
        except BaseException:
            os._exit(FAILED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    assert "torch" not in sys.modules, "the store needs no torch, and a fork of its threads may hang"
    for line in sys.stdin:
        number, folder = line.rstrip("\n").split(" ", 1)
        print(die(Path(folder), CHANGES[sys.argv[1]], int(number), sys.argv[2]), flush=True)
