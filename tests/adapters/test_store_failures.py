"""Every file operation of a change fails, in turn: the old state answers, and a restart is clean."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import AdapterError
from adapters.files import FileOps
from adapters.registry import Registry
from tests.adapters.test_registry import Shop


class Failing(FileOps):
    """Fails at the n-th operation: once, or from then on. A write or copy that fails leaves half a file."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail_at: int | None = None
        self.for_good = False
        self.after = False  # the operation takes effect, and fails all the same
        self.code = errno.ENOSPC

    def _step(self, what: str, act: Callable[[], object]) -> object:
        self.calls.append(what)
        number = len(self.calls) - 1
        if self.fail_at is not None and (number == self.fail_at or (self.for_good and number > self.fail_at)):
            if self.after:
                act()
            raise OSError(self.code, "no space left")
        return act()

    def mkdir(self, path):
        self._step("mkdir", lambda: FileOps.mkdir(self, path))

    def write(self, path, chunks):
        if self._fails_now():
            path.write_bytes(b"half")
        self._step("write", lambda: FileOps.write(self, path, chunks) if not path.exists() else None)

    def copy(self, source, target):
        if self._fails_now():
            target.write_bytes(b"half")
        self._step("copy", lambda: FileOps.copy(self, source, target) if not target.exists() else None)

    def protect(self, path):
        self._step("protect", lambda: FileOps.protect(self, path))

    def sync_file(self, path):
        self._step("sync_file", lambda: FileOps.sync_file(self, path))

    def sync_folder(self, path):
        self._step("sync_folder", lambda: FileOps.sync_folder(self, path))

    def replace(self, source, target):
        self._step("replace", lambda: FileOps.replace(self, source, target))

    def unlink(self, path):
        self._step("unlink", lambda: FileOps.unlink(self, path))

    def remove_tree(self, path):
        self._step("remove_tree", lambda: FileOps.remove_tree(self, path))

    def _fails_now(self) -> bool:
        number = len(self.calls)
        return self.fail_at is not None and (
            number == self.fail_at or (self.for_good and number > self.fail_at)
        )


def put_archive(shop: Shop, registry: Registry) -> None:
    registry.put_archive("legal", shop.root / "archive")


CHANGES: dict[str, Callable[[Shop, Registry], object]] = {
    "put_archive": put_archive,
    "put_folder": lambda shop, registry: registry.put_folder("legal", shop.root / "adapter9"),
    "put_new_name": lambda shop, registry: registry.put_folder("fresh", shop.root / "adapter9"),
    "put_known_content": lambda shop, registry: registry.put_folder("legal", shop.root / "adapter1"),
    "rollback": lambda shop, registry: registry.rollback("legal", 1),
    "delete": lambda shop, registry: registry.delete("legal"),
}


def prepare(original: Path, root: Path) -> tuple[Shop, Failing]:
    shutil.copytree(original, root, dirs_exist_ok=True)
    files = Failing()
    shop = Shop(root, keep_versions=1, files=files)
    files.calls.clear()
    return shop, files


def steps(original, tmp_path, change) -> int:
    shop, files = prepare(original, tmp_path / "count")
    change(shop, shop.registry)
    shop.store.close()
    return len(files.calls)


@pytest.mark.parametrize("mode", ["once", "for good", "after its effect"])
@pytest.mark.parametrize("name", CHANGES)
def test_each_operation_fails_in_turn(original, tmp_path, name, mode):
    change = CHANGES[name]
    total = steps(original, tmp_path, change)
    assert total >= 3
    failed = 0
    for number in range(total):
        shop, files = prepare(original, tmp_path / f"{number}")
        before, versions = shop.registry.entries(), shop.registry.versions("legal")
        files.fail_at, files.for_good, files.after = number, mode == "for good", mode == "after its effect"
        refusal = _refusal(lambda shop=shop: change(shop, shop.registry))
        if refusal:
            failed += 1
            assert refusal.code == "store_full", (number, files.calls[number])
            assert shop.registry.entries() == before
            assert shop.registry.versions("legal") == versions
            with shop.registry.resolve("legal") as reference:
                shop.registry.read(reference.generation)
        files.fail_at = None
        after = shop.registry.entries()
        _restart_and_check(shop, after, mode)
    assert failed >= 2


def _refusal(change: Callable[[], object]) -> AdapterError | None:
    try:
        change()
    except AdapterError as error:
        return error
    return None


def _restart_and_check(shop, after, mode):
    """Both states are whole; where the disk works again at once, the restart finds just what memory had."""
    shop.registry.sweep()
    if mode != "for good":
        shop.registry.check()
    registry = shop.reopen()
    registry.check()
    assert shop.store.files.names(shop.store.root / "incoming") == []
    if mode != "for good":
        assert registry.entries() == after
    for entry in registry.entries():
        assert entry.state == "ready"
        registry.read(entry.generation)
    kept = {version.generation for entry in registry.entries() for version in registry.versions(entry.name)}
    assert shop.store.generations() == kept, "something leaked"
    shop.store.close()


def test_other_errors_of_the_disk_are_not_called_full(original, tmp_path):
    shop, files = prepare(original, tmp_path)
    files.fail_at, files.code = 3, errno.EIO
    with pytest.raises(OSError, match="no space left") as caught:
        put_archive(shop, shop.registry)
    assert caught.value.errno == errno.EIO
    files.fail_at = None
    shop.registry.check()
    shop.store.close()


def test_a_quota_is_a_full_disk(original, tmp_path):
    shop, files = prepare(original, tmp_path)
    files.fail_at, files.code = 2, errno.EDQUOT
    with pytest.raises(AdapterError, match="disk is full") as caught:
        put_archive(shop, shop.registry)
    assert caught.value.code == "store_full"
    shop.store.close()


def test_what_is_renamed_was_synced_before(original, tmp_path):
    """Both files and their folder, the rename, its folder; then the name's file, its rename, its folder."""
    shop, files = prepare(original, tmp_path)
    put_archive(shop, shop.registry)
    changes = [call for call in files.calls if call in ("sync_file", "sync_folder", "replace")]
    assert changes[:6] == ["sync_file", "sync_file", "sync_folder", "replace", "sync_folder", "sync_file"]
    assert changes[6:8] == ["replace", "sync_folder"]
    shop.store.close()
