"""Names: puts, moves, history, references, and a start over whatever is on disk."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest
import torch

from adapters.appraiser import Appraiser
from adapters.errors import AdapterError, Finding
from adapters.files import FileOps
from adapters.pool import Pool
from adapters.records import Record, Target
from adapters.registry import Registry
from adapters.store import Store
from tests.adapters.samples import (
    adapter_files,
    make_config,
    make_layout,
    make_tensors,
    write_folder,
    write_zip,
)

LAYOUT = make_layout()


class Shop:
    """A registry over a folder, which can be closed and opened again."""

    def __init__(
        self, root: Path, keep_versions: int = 5, files: FileOps | None = None, quota: int | None = None
    ) -> None:
        self.root = root
        self.gone: list[str] = []
        self.now = 1000.0
        self.keep_versions = keep_versions
        self.quota = quota
        self.pool = Pool(LAYOUT, dict.fromkeys(LAYOUT.groups, 2), torch.float32, "cpu")
        self.open(files=files)

    def open(self, layout=LAYOUT, files: FileOps | None = None, fits=None) -> Registry:
        self.store = Store(self.root / "store", files or FileOps())
        self.registry = Registry(
            self.store,
            Appraiser(layout, torch.float32, 64, fits or self.pool.fits),
            keep_versions=self.keep_versions,
            quota=self.quota,
            on_stale=self.gone.append,
            clock=lambda: self.now,
        )
        return self.registry

    def reopen(self, **options) -> Registry:
        self.store.close()
        return self.open(**options)

    def folder(self, seed: int, **settings) -> Path:
        return write_folder(self.root / f"adapter{seed}", make_config(**settings), make_tensors(seed=seed))

    def put(self, name: str, seed: int, if_match: str | None = None):
        return self.registry.put_folder(name, self.folder(seed), if_match)


@pytest.fixture
def shop(tmp_path):
    shop = Shop(tmp_path)
    yield shop
    shop.registry.check()
    assert shop.store.files.names(shop.store.root / "incoming") == []
    shop.store.close()


def code(caught) -> str:
    return caught.value.code


def test_put_and_resolve(shop):
    put = shop.put("legal", 1)
    entry = put.entry
    assert put.created
    assert (entry.name, entry.revision, entry.created, entry.updated) == ("legal", 1, 1000, 1000)
    assert (entry.rank, entry.modules, entry.base_model) == (4, ("q_proj", "v_proj"), "some/base")
    assert entry.nbytes == sum(len(data) for data in adapter_files(shop.root / "adapter1").values())
    assert (entry.state, entry.references, entry.findings) == ("ready", 0, ())
    with shop.registry.resolve("legal") as reference:
        assert reference.generation == entry.generation
        assert shop.registry.entry("legal").references == 1
        adapter = shop.registry.read(reference.generation)
        assert adapter.generation == entry.generation
    assert shop.registry.entry("legal").references == 0
    assert adapter_files(shop.store.folder(entry.generation)) == adapter_files(shop.root / "adapter1")


def test_nobody_writes_to_what_is_stored(shop):
    folder = shop.store.folder(shop.put("legal", 1).entry.generation)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}
    shop.registry.delete("legal")
    assert not folder.exists()


def test_an_archive_and_a_folder_of_one_content_are_one_generation(shop, tmp_path):
    archive = write_zip(tmp_path / "archive", {f"x/{k}": v for k, v in adapter_files(shop.folder(1)).items()})
    first = shop.registry.put_archive("legal", archive)
    assert not shop.put("legal", 1).created
    assert shop.put("other", 1).entry.generation == first.entry.generation
    assert len(shop.store.generations()) == 1
    assert [entry.name for entry in shop.registry.entries()] == ["legal", "other"]


def test_the_same_content_again_changes_nothing(shop):
    first = shop.put("legal", 1)
    shop.now = 2000.0
    again = shop.put("legal", 1)
    assert not again.created
    assert again.entry == first.entry


def test_a_new_content_is_a_new_revision(shop):
    shop.put("legal", 1)
    shop.now = 2000.0
    entry = shop.put("legal", 2).entry
    assert (entry.revision, entry.created, entry.updated) == (2, 1000, 2000)
    assert [version.revision for version in shop.registry.versions("legal")] == [2, 1]


def test_unknown_names(shop):
    shop.put("legal", 1)
    for ask in (shop.registry.resolve, shop.registry.entry, shop.registry.delete, shop.registry.versions):
        with pytest.raises(AdapterError, match='no adapter is named "legak"; did you mean legal') as caught:
            ask("legak")
        assert code(caught) == "adapter_not_found"


def test_names_are_held_to_the_rule(shop):
    with pytest.raises(AdapterError) as caught:
        shop.put("../x", 1)
    assert code(caught) == "invalid_adapter_name"


def test_nothing_is_stored_of_what_is_refused(shop):
    shop.put("legal", 1)
    before = shop.registry.entries()
    for folder in (
        write_folder(shop.root / "a", make_config(use_dora=True)),
        write_folder(shop.root / "b", tensors=make_tensors(rank=0)),
        write_folder(shop.root / "c", make_config(r=33), make_tensors(rank=33)),
    ):
        with pytest.raises(AdapterError):
            shop.registry.put_folder("legal", folder)
    assert shop.registry.entries() == before
    assert len(shop.store.generations()) == 1


def test_if_match(shop):
    with pytest.raises(AdapterError, match="does not exist") as caught:
        shop.put("legal", 1, if_match="*")
    assert code(caught) == "precondition_failed"
    one = shop.put("legal", 1).entry.generation
    two = shop.put("legal", 2, if_match=one).entry.generation
    for change in (
        lambda: shop.put("legal", 3, if_match=one),
        lambda: shop.registry.delete("legal", if_match=one),
        lambda: shop.registry.rollback("legal", 1, if_match=one),
    ):
        with pytest.raises(AdapterError, match=f"is at {two}") as caught:
            change()
        assert code(caught) == "precondition_failed"
    assert shop.registry.entry("legal").generation == two
    shop.registry.rollback("legal", 1, if_match=two)
    shop.registry.delete("legal", if_match="*")
    assert shop.registry.entries() == []


def test_rollback_is_a_new_revision_of_an_old_generation(shop):
    one, two = shop.put("legal", 1).entry.generation, shop.put("legal", 2).entry.generation
    entry = shop.registry.rollback("legal", 1)
    assert (entry.generation, entry.revision) == (one, 3)
    entry = shop.registry.rollback("legal", two)
    assert (entry.generation, entry.revision) == (two, 4)
    assert shop.registry.rollback("legal", two) == entry, "already there"
    assert [version.generation for version in shop.registry.versions("legal")] == [two, one, two, one]
    for unknown in (9, "f" * 64, "1"):
        with pytest.raises(AdapterError, match="it has 4, 3, 2, 1"):
            shop.registry.rollback("legal", unknown)


def test_only_the_last_versions_are_kept(shop):
    shop.keep_versions = 2
    shop.reopen()
    generations = [shop.put("legal", seed).entry.generation for seed in range(5)]
    assert shop.store.generations() == set(generations[2:])
    with shop.registry.resolve("legal"):
        for seed in range(5, 9):
            shop.put("legal", seed)
        assert generations[4] in shop.store.generations(), "held"
    shop.registry.sweep()
    assert generations[4] not in shop.store.generations()


def test_a_reference_outlives_its_name(shop):
    shop.put("legal", 1)
    reference = shop.registry.resolve("legal")
    shop.registry.delete("legal")
    assert shop.gone == []
    assert shop.registry.read(reference.generation).rank == 4
    shop.registry.check()
    reference.release()
    reference.release()
    assert shop.gone == [reference.generation]
    shop.registry.sweep()
    assert shop.store.generations() == set()


def test_check_sees_a_table_that_drifted(shop):
    shop.put("legal", 1)
    names = shop.registry._names
    good = dict(names._resolved)
    for bad in ({}, {"legal": "f" * 64}, {"legal": ()}, good | {"other": good["legal"]}):
        names._resolved.clear()
        names._resolved.update(bad)
        with pytest.raises(AssertionError, match="another state"):
            shop.registry.check()
    names._resolved.clear()
    names._resolved.update(good)


def test_requests_cannot_write_what_they_read(shop):
    with pytest.raises(TypeError):
        shop.registry._resolved["legal"] = "f" * 64


def test_a_release_is_told_when_another_name_is_at_another_generation(shop):
    shop.put("legal", 1)
    shop.put("other", 1)
    reference = shop.registry.resolve("legal")
    shop.put("legal", 2)
    reference.release()
    assert shop.gone == [], "other has it"
    reference = shop.registry.resolve("other")
    shop.put("other", 2)
    reference.release()
    assert shop.gone == [reference.generation]


def test_the_hook_hears_of_what_nobody_uses(shop):
    one = shop.put("legal", 1).entry.generation
    shop.put("other", 1)
    shop.put("legal", 2)
    assert shop.gone == [], "other has it"
    shop.registry.delete("other")
    assert shop.gone == [one]
    assert one in shop.store.generations(), "the history of legal has it"
    shop.registry.rollback("legal", 1)
    assert len(shop.gone) == 2


def test_a_restart_finds_everything_as_it_was(shop):
    shop.put("legal", 1)
    shop.put("legal", 2)
    shop.put("other", 1)
    before = shop.registry.entries(), shop.registry.versions("legal")
    shop.reopen()
    assert (shop.registry.entries(), shop.registry.versions("legal")) == before


def test_a_restart_removes_what_has_no_name(shop):
    reference = shop.registry.resolve(shop.put("legal", 1).entry.name)
    shop.registry.delete("legal")
    assert shop.store.generations() == {reference.generation}
    shop.reopen()
    assert shop.store.generations() == set()


def test_a_restart_knows_who_moved_a_name(shop):
    def movers():
        return [shop.registry.entry("legal").mover, shop.reopen().entry("legal").mover]

    shop.registry.put_folder("legal", shop.folder(1), mover="start")
    assert movers() == ["start"] * 2
    shop.put("legal", 1)
    assert movers() == ["start"] * 2, "nothing has moved"
    shop.put("legal", 2)
    assert movers() == ["client"] * 2
    shop.registry.put_folder("legal", shop.folder(3), mover="start")
    shop.registry.rollback("legal", 1)
    assert movers() == ["client"] * 2


def test_names_that_do_not_fit_another_base_are_kept(shop):
    shop.put("legal", 1)
    registry = shop.reopen(layout=make_layout(1))
    entry = registry.entry("legal")
    assert entry.state == "incompatible"
    assert "layers.1" in str(entry.findings[0])
    with pytest.raises(AdapterError, match="is not a module that this base adapts") as caught:
        registry.resolve("legal")
    assert code(caught) == "adapter_incompatible"
    with pytest.raises(AdapterError):
        shop.put("legal", 1)
    shop.reopen()
    assert shop.registry.entry("legal").state == "ready"


def test_names_that_no_longer_fit_the_pool_are_kept(shop):
    shop.put("legal", 1)

    def fits(adapter):
        raise AdapterError("adapter_too_large", "too large", (Finding("pool", "has one page"),))

    entry = shop.reopen(fits=fits).entry("legal")
    assert (entry.state, str(entry.findings[0])) == ("incompatible", "pool: has one page")


def test_a_refusal_without_findings_is_one(shop):
    shop.put("legal", 1)

    def fits(adapter):
        raise AdapterError("adapter_too_large", "too large")

    assert shop.reopen(fits=fits).entry("legal").findings[0].problem == "too large"


def test_a_broken_name_does_not_stop_the_start(shop):
    one = shop.put("legal", 1).entry.generation
    shop.put("other", 2)
    path = shop.store.root / "names" / "legal.json"
    path.write_text("{")
    registry = shop.reopen()
    entry = registry.entry("legal")
    assert (entry.state, entry.generation, entry.revision) == ("incompatible", "", 0)
    assert entry.findings[0].where == "names/legal.json"
    assert registry.versions("legal") == []
    with pytest.raises(AdapterError):
        registry.resolve("legal")
    registry.resolve("other").release()
    assert one in shop.store.generations(), "whoever mends the file will want it"
    with pytest.raises(AdapterError, match="a broken state"):
        shop.put("legal", 3, if_match=one)
    assert shop.put("legal", 3).entry.state == "ready"
    assert one not in shop.store.generations()


def test_a_broken_name_can_be_deleted(shop):
    shop.put("legal", 1)
    (shop.store.root / "names" / "legal.json").write_text('{"schema": 7}')
    shop.reopen()
    assert "schema 7" in str(shop.registry.entry("legal").findings[0])
    shop.registry.delete("legal")
    assert shop.registry.entries() == []
    assert shop.store.generations() == set()


def test_a_name_whose_files_are_gone(shop):
    generation = shop.put("legal", 1).entry.generation
    shop.store.drop(generation)
    shop.reopen()
    assert "cannot be read" in str(shop.registry.entry("legal").findings[0])
    assert shop.put("legal", 1).entry.state == "ready"


def test_a_generation_that_cannot_be_read_back_is_named(shop):
    generation = shop.put("legal", 1).entry.generation
    cut_short(shop.store.folder(generation) / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=generation) as caught:
        shop.registry.read(generation)
    assert code(caught) == "adapter_load_failed"
    assert caught.value.findings
    shop.reopen()  # the damage was done behind its back
    assert shop.registry.entry("legal").state == "incompatible"


def overwrite(path: Path) -> None:
    """Other numbers in place of the last tensor's, all of them finite, in the same bytes of the disk."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


def cut_short(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "overwritten": overwrite,
    "cut short": cut_short,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_read_back_is_what_was_sent_and_is_mended_by_sending_it_again(shop, damage):
    before = shop.put("legal", 1).entry
    file = shop.store.folder(before.generation) / "adapter_model.safetensors"
    damage(file)
    with pytest.raises(AdapterError) as caught:
        shop.registry.read(before.generation)
    assert code(caught) == "adapter_load_failed"
    assert before.generation in str(caught.value)
    assert "send them again" in str(caught.value)
    assert str(shop.root) not in str(caught.value), "a client need not know where the store is"
    put = shop.put("legal", 1)
    assert (put.created, put.entry) == (False, before)
    assert shop.gone == [before.generation], "whoever read the damaged file is told"
    assert shop.registry.read(before.generation).rank == 4
    shop.registry.check()


def test_a_name_is_deleted_while_the_same_content_is_put(shop, monkeypatch):
    before, intact = shop.put("legal", 1).entry, shop.store.intact

    def slow(generation):
        found = intact(generation)
        shop.registry.delete("legal")
        return found

    monkeypatch.setattr(shop.store, "intact", slow)
    put = shop.put("legal", 1)
    assert (put.created, put.entry) == (False, before), "as it was before the deletion"
    assert "legal" not in shop.registry


def test_a_damaged_generation_is_mended_through_another_name(shop):
    generation = shop.put("legal", 1).entry.generation
    overwrite(shop.store.folder(generation) / "adapter_model.safetensors")
    assert shop.put("other", 1).created
    assert shop.gone == [generation]
    assert shop.registry.read(generation).rank == 4


def test_a_name_is_not_rolled_back_to_a_damaged_generation(shop):
    one = shop.put("legal", 1).entry.generation
    two = shop.put("legal", 2).entry
    overwrite(shop.store.folder(one) / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="version 1 of adapter legal is damaged") as caught:
        shop.registry.rollback("legal", 1)
    assert code(caught) == "adapter_load_failed"
    assert shop.registry.entry("legal") == two


def test_the_upload_bound(shop, tmp_path):
    registry = Registry(shop.store, Appraiser(LAYOUT, torch.float32, 64, shop.pool.fits), max_bytes=100)
    archive = write_zip(tmp_path / "archive", adapter_files(shop.folder(1)))
    with pytest.raises(AdapterError) as caught:
        registry.put_archive("legal", archive)
    assert code(caught) == "adapter_upload_too_large"


def test_a_record_of_the_future_is_kept(shop):
    shop.put("legal", 1)
    shop.store.write("later", Record(3, 1, 2, (Target("a" * 64),)))
    shop.reopen()
    assert shop.registry.entry("later").state == "incompatible"


def test_threads_put_resolve_and_delete_at_once(shop):
    folders = [shop.folder(seed) for seed in range(3)]
    failures: list[BaseException] = []
    stop = time.monotonic() + 0.6

    def run(work):
        try:
            while time.monotonic() < stop:
                work()
        except BaseException as error:
            failures.append(error)

    def put(seed):
        return lambda: shop.registry.put_folder("legal", folders[seed])

    def use():
        try:
            with shop.registry.resolve("legal") as reference:
                shop.registry.read(reference.generation)
        except AdapterError as error:
            if error.code != "adapter_not_found":
                raise

    def delete():
        try:
            shop.registry.delete("legal")
        except AdapterError as error:
            if error.code != "adapter_not_found":
                raise
        time.sleep(0.02)

    threads = [
        threading.Thread(target=run, args=(work,)) for work in (put(0), put(1), put(2), use, use, delete)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    shop.registry.sweep()
