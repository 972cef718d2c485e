"""The store's bound in bytes: what counts, what makes room by itself, and that a refusal changes nothing."""

from __future__ import annotations

import shutil
import threading

import pytest

from adapters.errors import AdapterError
from adapters.files import FileOps
from tests.adapters.samples import adapter_files, make_tensors, write_folder
from tests.adapters.test_registry import Shop, cut_short


@pytest.fixture
def shop(tmp_path):
    shop = Shop(tmp_path, keep_versions=1)
    yield shop
    shop.registry.check()
    assert shop.store.files.names(shop.store.root / "incoming") == []
    shop.store.close()


def size_of_one(shop: Shop) -> int:
    return sum(len(data) for data in adapter_files(shop.folder(1)).values())


def allow(shop: Shop, count: int) -> int:
    """A quota for so many adapters, to the byte; the bytes of one."""
    one = size_of_one(shop)
    shop.quota = count * one
    shop.reopen()
    return one


def refused(shop: Shop, name: str, seed: int) -> str:
    before = shop.registry.entries(), shop.store.generations(), shop.registry.stored_bytes
    with pytest.raises(AdapterError) as caught:
        shop.put(name, seed)
    assert caught.value.code == "store_full"
    assert (shop.registry.entries(), shop.store.generations(), shop.registry.stored_bytes) == before
    return caught.value.message


def test_one_more_than_the_quota_is_refused_with_what_to_do(shop):
    one = allow(shop, 2)
    shop.put("a", 1)
    shop.put("b", 2)
    assert shop.registry.stored_bytes == 2 * one
    said = refused(shop, "c", 3)
    for word in (f"{2 * one} bytes", "--adapter-store-bytes", f"add {one}", "--keep-versions", "delete"):
        assert word in said
    shop.registry.delete("a")
    assert shop.put("c", 3).created


def test_a_byte_too_few_is_too_few(shop):
    shop.quota = size_of_one(shop) - 1
    shop.reopen()
    refused(shop, "a", 1)


def test_one_content_under_two_names_counts_once(shop):
    one = allow(shop, 1)
    shop.put("a", 1)
    shop.put("b", 1)
    assert shop.registry.stored_bytes == one
    shop.registry.delete("a")
    refused(shop, "c", 2)
    shop.registry.delete("b")
    assert shop.registry.stored_bytes == 0


def test_a_version_that_expires_makes_room(shop):
    allow(shop, 2)
    for seed in range(4):
        assert shop.put("a", seed).created
    assert len(shop.store.generations()) == 2
    refused(shop, "b", 9)


def test_an_expired_version_in_use_makes_none(shop):
    allow(shop, 2)
    shop.put("a", 1)
    reference = shop.registry.resolve("a")
    shop.put("a", 2)
    refused(shop, "a", 3)
    reference.release()
    assert shop.put("a", 3).created


def test_a_restart_counts_what_is_there(shop):
    one = allow(shop, 2)
    shop.put("a", 1)
    shop.put("b", 2)
    shop.reopen()
    assert shop.registry.stored_bytes == 2 * one
    refused(shop, "c", 3)


def test_a_store_past_its_quota_is_served_and_takes_nothing_new(shop):
    shop.put("a", 1)
    shop.put("b", 2)
    one = allow(shop, 1)
    assert [entry.state for entry in shop.registry.entries()] == ["ready", "ready"]
    refused(shop, "c", 3)
    assert shop.put("c", 2).created, "it adds nothing"
    for name in "abc":
        shop.registry.delete(name)
    assert shop.put("c", 3).created
    assert shop.registry.stored_bytes == one


def test_while_a_name_is_broken_everything_counts(shop):
    allow(shop, 2)
    shop.put("a", 1)
    shop.put("b", 2)
    (shop.store.root / "names" / "a.json").write_text("{")
    shop.reopen()
    shop.registry.delete("b")
    refused(shop, "c", 3)
    shop.registry.delete("a")
    assert shop.put("c", 3).created


def test_what_a_failed_upload_wrote_does_not_count(shop):
    class Full(FileOps):
        def replace(self, source, target):
            if target.parent.name == "names":
                raise OSError(28, "no space left")
            super().replace(source, target)

    one = size_of_one(shop)
    shop.quota = one
    shop.reopen(files=Full())
    with pytest.raises(AdapterError, match="disk is full"):
        shop.put("a", 1)
    assert shop.registry.stored_bytes == 0
    shop.reopen()
    assert shop.put("a", 2).created


def test_a_damaged_generation_is_counted_as_it_is_and_mended(shop):
    one = allow(shop, 1)
    generation = shop.put("a", 1).entry.generation
    cut_short(shop.store.folder(generation) / "adapter_model.safetensors")
    shop.reopen()
    assert shop.registry.stored_bytes < one
    assert shop.put("a", 1).entry.state == "ready"
    assert shop.registry.stored_bytes == one


def test_uploads_side_by_side_do_not_share_the_last_room(shop):
    """Each would fit alone; they are checked at the same time and take their turns afterwards."""
    folders = [write_folder(shop.root / f"s{i}", tensors=make_tensors(seed=20 + i)) for i in range(4)]
    allow(shop, 2)
    results: list[str] = []
    start = threading.Barrier(4)

    def put(index: int) -> None:
        start.wait()
        try:
            shop.registry.put_folder(f"n{index}", folders[index])
            results.append("stored")
        except AdapterError as error:
            results.append(error.code)

    threads = [threading.Thread(target=put, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["store_full", "store_full", "stored", "stored"]
    assert shop.registry.stored_bytes <= shop.quota


def test_check_sees_bytes_that_drifted(shop):
    shop.put("a", 1)
    generation = shop.put("b", 2).entry.generation
    folder = shop.store.folder(generation)
    shutil.copytree(folder, shop.root / "kept")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(AssertionError, match="counted amiss"):
        shop.registry.check()
    shutil.copy(shop.root / "kept" / "adapter_config.json", folder)
