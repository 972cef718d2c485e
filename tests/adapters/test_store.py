"""The store's folder: what is kept, how it is named, and who may use it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.errors import AdapterError
from adapters.files import FileOps
from adapters.lock import StoreLockedError
from adapters.records import BrokenRecordError, Record, Target, check_name, dump_record, parse_record
from adapters.store import Store, hash_folder
from tests.adapters.samples import adapter_files, write_folder

G1, G2 = "1" * 64, "2" * 64


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store", FileOps())
    yield store
    store.close()


def test_the_generation_is_a_hash_of_both_files_framed_by_length(tmp_path):
    folder = write_folder(tmp_path / "a")
    frames = b"".join(
        len(name).to_bytes(8, "little") + name.encode() + len(data).to_bytes(8, "little") + data
        for name, data in adapter_files(folder).items()
    )
    assert hash_folder(folder) == hashlib.sha256(frames).hexdigest()


def test_files_are_kept_byte_for_byte(store, tmp_path):
    original = adapter_files(write_folder(tmp_path / "a"))
    folder = store.incoming()
    for name, data in original.items():
        store.files.write(folder / name, [data])
    generation = hash_folder(folder)
    store.sync(folder)
    store.keep(folder, generation)
    assert adapter_files(store.folder(generation)) == original
    assert store.generations() == {generation}
    assert store.files.names(store.root / "incoming") == []
    store.drop(generation)
    assert store.generations() == set()
    assert store.files.names(store.root / "incoming") == []


def test_a_damaged_generation_is_mended_by_the_same_content(store, tmp_path):
    original = adapter_files(write_folder(tmp_path / "a"))
    for _ in range(2):
        folder = store.incoming()
        for name, data in original.items():
            store.files.write(folder / name, [data])
        generation = hash_folder(folder)
        store.keep(folder, generation)
        store.discard(folder)
        assert adapter_files(store.folder(generation)) == original
        (store.folder(generation) / "adapter_config.json").write_text("{}")


def test_names_are_written_and_read(store):
    record = Record(1, 10, 10, (Target(G1),)).moved(G2, 20, keep_versions=5, mover="start")
    store.write("legal.v1", record)
    assert store.names() == ["legal.v1"]
    assert store.read("legal.v1") == record
    raw = json.loads((store.root / "names" / "legal.v1.json").read_text())
    assert raw["schema"] == 1
    assert raw["targets"] == [{"generation": G2, "weight": 1.0}]
    assert raw["history"] == [{"generation": G1, "revision": 1, "time": 10}]
    assert raw["mover"] == "start"
    store.remove("legal.v1")
    assert store.names() == []


def test_strange_files_among_the_names_are_no_names(store):
    for name in (".hidden.json", "x.tmp", "a b.json", ".json"):
        (store.root / "names" / name).write_text("{}")
    assert store.names() == []


def test_history_keeps_the_last(tmp_path):
    record = Record(1, 0, 0, (Target(G1),))
    for now in range(1, 10):
        record = record.moved(G2 if now % 2 else G1, now, keep_versions=3)
    assert [version.revision for version in record.history] == [7, 8, 9]
    assert record.revision == 10
    assert Record(1, 0, 0, (Target(G1),)).moved(G2, 1, keep_versions=0).history == ()


@pytest.mark.parametrize("name", ["a", "A1", "legal-v1.2_x", "x" * 64, "con", "a..b", "0"])
def test_names_that_are_fine(name):
    check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".a", "-a", "_a", "x" * 65, "a/b", "a\\b", "a b", "a:b", "a,b", 'a"b', "ä", "a\n", "a\0"],
)
def test_names_that_break_the_rule(name):
    with pytest.raises(AdapterError) as caught:
        check_name(name)
    assert caught.value.code == "invalid_adapter_name"


GOOD = {
    "schema": 1,
    "revision": 1,
    "created": 1,
    "updated": 1,
    "targets": [{"generation": G1, "weight": 1.0}],
    "history": [],
}


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": None},
        {"revision": "1"},
        {"revision": -1},
        {"revision": True},
        {"targets": []},
        {"targets": [{"generation": G1, "weight": 1}, {"generation": G2, "weight": 1}]},
        {"targets": [{"generation": "../../etc", "weight": 1}]},
        {"targets": [{"generation": G1, "weight": "much"}]},
        {"targets": [G1]},
        {"history": [{"generation": G1}]},
        {"history": None},
        {"mover": "nobody"},
        {"mover": ["client"]},
    ],
)
def test_broken_records(change):
    with pytest.raises(BrokenRecordError):
        parse_record(json.dumps(GOOD | change).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b"\xff", b"[" * 100_000, b"{}"])
def test_files_that_are_no_records(data):
    with pytest.raises(BrokenRecordError):
        parse_record(data)


def test_records_survive_a_round_trip():
    record = parse_record(json.dumps(GOOD).encode())
    assert parse_record(dump_record(record)) == record


def test_leftovers_are_removed_at_start(tmp_path):
    store = Store(tmp_path / "store", FileOps())
    (store.incoming() / "x").write_text("x")
    (tmp_path / "store" / "incoming" / "y.json").write_text("y")
    store.close()
    store = Store(tmp_path / "store", FileOps())
    assert store.files.names(tmp_path / "store" / "incoming") == []
    store.close()


def test_a_second_server_is_told_who_has_the_store(store, tmp_path):
    with pytest.raises(StoreLockedError) as caught:
        Store(tmp_path / "store", FileOps())
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    assert str(tmp_path / "store") in str(caught.value)
    store.close()
    store.close()
    Store(tmp_path / "store", FileOps()).close()


def test_another_process_is_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    code = (
        "import sys, os; from pathlib import Path; from adapters.files import FileOps; "
        "from adapters.store import Store; Store(Path(sys.argv[1]), FileOps()); "
        "print('held', flush=True); sys.stdin.read(); os._exit(9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StoreLockedError, match=f"process {process.pid} on"):
            Store(tmp_path / "store", FileOps())
        process.stdin.close()
        assert process.wait(30) == 9
    Store(tmp_path / "store", FileOps()).close()


def test_a_holder_that_has_not_written_its_name(tmp_path):
    store = Store(tmp_path / "store", FileOps())
    (tmp_path / "store" / "lock").write_text("")
    with pytest.raises(StoreLockedError, match="has not written its name yet"):
        Store(tmp_path / "store", FileOps())
    store.close()


def test_a_disk_that_knows_no_modes_is_no_reason_to_refuse(tmp_path, monkeypatch):
    """As a network share that is mounted for one user."""

    def refuse(path, mode):
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(Path, "chmod", refuse)
    FileOps().protect(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
