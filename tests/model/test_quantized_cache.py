"""Quantized copies: found again, made whole or not at all, and told apart by everything that matters."""

import os
import threading
import time

import pytest

from server.model.quantized_cache import cache_key, cached


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"abcd")
    return folder


def fill(content):
    return lambda into: (into / "weights").write_text(content)


def test_made_once(tmp_path):
    made = cached(tmp_path / "root", "key", fill("first"))
    assert (made / "weights").read_text() == "first"
    assert cached(tmp_path / "root", "key", fill("second")) == made
    assert (made / "weights").read_text() == "first"
    assert cached(tmp_path / "root", "other", fill("second")) != made


def test_a_failed_make_leaves_nothing(tmp_path):
    def fail(into):
        (into / "half").write_text("half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        cached(tmp_path / "root", "key", fail)
    assert list((tmp_path / "root").iterdir()) == []
    assert (cached(tmp_path / "root", "key", fill("whole")) / "weights").read_text() == "whole"


def test_a_full_disk_is_told(tmp_path):
    def full(into):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        cached(tmp_path / "root", "key", full)
    assert list((tmp_path / "root").iterdir()) == []


def test_two_makers_at_once_agree_on_one_copy(tmp_path):
    both = threading.Barrier(2)
    found = []

    def make(into):
        both.wait(30)
        fill("same")(into)

    makers = [
        threading.Thread(target=lambda: found.append(cached(tmp_path / "root", "key", make)))
        for _ in range(2)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(30)
    assert found == [tmp_path / "root" / "key"] * 2
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["key"]
    assert (found[0] / "weights").read_text() == "same"


def test_what_a_killed_maker_left_is_removed_by_the_next(tmp_path):
    """And what another one is making is not."""
    root = tmp_path / "root"
    (root / ".making-killed").mkdir(parents=True)
    (root / ".making-killed" / "weights").write_text("half")
    os.utime(root / ".making-killed", (time.time() - 100_000,) * 2)

    def make(into):
        cached(root, "other", fill("other"))
        fill("whole")(into)

    assert (cached(root, "key", make) / "weights").read_text() == "whole"
    assert sorted(path.name for path in root.iterdir()) == ["key", "other"]


def test_the_key_is_the_same_for_the_same(checkpoint):
    assert cache_key(checkpoint, {"a": "1", "b": "2"}) == cache_key(checkpoint, {"b": "2", "a": "1"})


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "generation_config.json"])
def test_the_key_looks_at_weights_alone(checkpoint, name):
    before = cache_key(checkpoint, {})
    (checkpoint / name).write_text("new")
    assert cache_key(checkpoint, {}) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"abcde"),
        lambda folder: (folder / "model-2.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
        lambda folder: (folder / "config.json").write_text("{ }"),
    ],
    ids=["size", "file", "name", "config"],
)
def test_the_key_changes_with_the_checkpoint(checkpoint, change):
    before = cache_key(checkpoint, {})
    change(checkpoint)
    assert cache_key(checkpoint, {}) != before


def test_the_key_changes_with_the_time_and_the_settings(checkpoint):
    import os

    before = cache_key(checkpoint, {"quantization": "nf4"})
    assert cache_key(checkpoint, {"quantization": "int8"}) != before
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert cache_key(checkpoint, {"quantization": "nf4"}) != before
