"""Archives of strangers: the two files come out byte for byte, or the archive is refused and says why."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import AdapterError
from adapters.sources import copy_folder, unpack
from tests.adapters.samples import adapter_files, write_folder, write_zip

BOUND = 16 * 1024 * 1024
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def files(tmp_path):
    return adapter_files(write_folder(tmp_path / "original"))


def tar(path, entries, mode="w", **fields):
    with tarfile.open(path, mode) as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return path


def make(kind, path, entries):
    if kind == "zip":
        return write_zip(path, entries)
    return tar(path, entries, "w:gz" if kind == "tar.gz" else "w")


KINDS = pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])


def unpacked(archive, tmp_path, bound=BOUND):
    into = tmp_path / "into"
    into.mkdir(exist_ok=True)
    unpack(archive, into, bound)
    return {path.name: path.read_bytes() for path in into.iterdir()}


def refused(archive, tmp_path, code="invalid_archive", bound=BOUND) -> str:
    with pytest.raises(AdapterError) as caught:
        unpacked(archive, tmp_path, bound)
    assert caught.value.code == code, str(caught.value)
    assert {path.name for path in tmp_path.rglob("*")} <= {
        *("original", "into", "archive", "outside", CONFIG, TENSORS),
    }, "something else was written"
    return str(caught.value)


@KINDS
@pytest.mark.parametrize("folder", ["", "adapter/", "./", "a/b/c/"])
def test_the_two_files_come_out_byte_for_byte(tmp_path, files, kind, folder):
    entries = {folder + name: data for name, data in files.items()}
    entries |= {
        folder + "README.md": b"words",
        folder + "tokenizer.json": b"{}",
        folder + "run.py": b"import os",
    }
    assert unpacked(make(kind, tmp_path / "archive", entries), tmp_path) == files


def test_a_zip_of_a_folder_made_by_the_tools(tmp_path, files):
    with zipfile.ZipFile(tmp_path / "archive", "w", zipfile.ZIP_STORED) as archive:
        archive.mkdir("adapter")
        for name in files:
            archive.write(tmp_path / "original" / name, f"adapter/{name}")
    assert unpacked(tmp_path / "archive", tmp_path) == files


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_of_a_folder_made_by_the_tools(tmp_path, files, form):
    with tarfile.open(tmp_path / "archive", "w:gz", format=form) as archive:
        archive.add(tmp_path / "original", "n" * 90)
    assert unpacked(tmp_path / "archive", tmp_path) == files


def windows_zip(path, entries):
    """As .NET Framework writes one, and so Compress-Archive of Windows' own PowerShell: backslashes, no attributes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system, info.compress_type = name, 0, zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return path


def test_a_zip_with_the_separators_of_windows(tmp_path, files):
    entries = {"out\\adapter\\" + name: data for name, data in files.items()}
    archive = windows_zip(tmp_path / "archive", {"out\\": b"", "out\\adapter\\": b"", **entries})
    assert unpacked(archive, tmp_path) == files


def test_separators_of_windows_part_folders(tmp_path, files):
    entries = {"a\\" + CONFIG: files[CONFIG], "b\\" + TENSORS: files[TENSORS]}
    assert "in different folders" in refused(windows_zip(tmp_path / "archive", entries), tmp_path)
    (tmp_path / "into" / CONFIG).unlink()
    (tmp_path / "into" / TENSORS).unlink()
    entries = {"a\\" + CONFIG: files[CONFIG], "a\\adapter_model.bin": b"\x80\x02"}
    assert "never loaded" in refused(windows_zip(tmp_path / "archive", entries), tmp_path)


@KINDS
def test_what_the_finder_and_tar_of_macos_add(tmp_path, files, kind):
    double = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100)
    entries = {"__MACOSX/._adapter": double, "adapter/.DS_Store": b"x"}
    for name, data in files.items():
        entries |= {
            "adapter/._" + name: double,
            "__MACOSX/adapter/._" + name: double,
            "adapter/" + name: data,
        }
    assert unpacked(make(kind, tmp_path / "archive", entries), tmp_path) == files


@KINDS
def test_a_colon_in_a_name_leads_nowhere(tmp_path, files, kind):
    entries = {"adapter/logs/2026-11-28 10:10:33.log": b"x"} | files
    assert unpacked(make(kind, tmp_path / "archive", entries), tmp_path) == files


def test_other_files_of_a_checkpoint_are_left_alone(tmp_path, files):
    entries = files | {"training_args.bin": pickle.dumps({}), "optimizer.pt": b"PK\x03\x04"}
    assert unpacked(make("zip", tmp_path / "archive", entries), tmp_path) == files


@KINDS
@pytest.mark.parametrize(
    "name",
    [
        *(
            "../adapter_config.json",
            "a/../../x",
            "/etc/passwd",
            "/adapter_config.json",
            "..\\x",
            "C:\\x",
            "C:/x",
        ),
        *("a\\..\\..\\x", "\\x", "\\\\host\\x", "c:x"),
    ],
)
def test_paths_that_lead_out(tmp_path, files, kind, name):
    said = refused(make(kind, tmp_path / "archive", {name: b"x"} | files), tmp_path)
    assert "leads out of the archive" in said


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
@pytest.mark.parametrize("name", [CONFIG, "other"])
def test_links_and_devices_in_a_tar(tmp_path, files, kind, name):
    with tarfile.open(tmp_path / "archive", "w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    assert "link or a device" in refused(tmp_path / "archive", tmp_path) or kind == tarfile.GNUTYPE_SPARSE


def test_links_in_a_zip(tmp_path, files):
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        info = zipfile.ZipInfo(CONFIG)
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    assert "link or a device" in refused(tmp_path / "archive", tmp_path)


@KINDS
@pytest.mark.parametrize("second", ["b/" + CONFIG, "Adapter_Config.json", "checkpoint-10/" + TENSORS])
def test_names_that_are_there_twice(tmp_path, files, kind, second):
    assert "twice" in refused(make(kind, tmp_path / "archive", files | {second: b"{}"}), tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_one_name_twice_in_a_zip(tmp_path, files):
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr(CONFIG, "{}")
        archive.writestr(CONFIG, "{} ")
    assert "twice" in refused(tmp_path / "archive", tmp_path)


@KINDS
def test_files_in_different_folders(tmp_path, files, kind):
    entries = {"a/" + CONFIG: files[CONFIG], "b/" + TENSORS: files[TENSORS]}
    assert "in different folders" in refused(make(kind, tmp_path / "archive", entries), tmp_path)


@KINDS
def test_what_is_missing_is_named_with_what_is_there(tmp_path, files, kind):
    said = refused(make(kind, tmp_path / "archive", {CONFIG: b"{}", "x": b""}), tmp_path)
    assert f"no {TENSORS}, but '{CONFIG}', 'x'" in said


@pytest.mark.parametrize("name", ["adapter_model.bin", "a/adapter_model.pt", "adapter_model.ckpt"])
def test_pickles_are_refused_with_the_converter(tmp_path, files, name):
    said = refused(make("zip", tmp_path / "archive", {CONFIG: b"{}", name: b"\x80\x02"}), tmp_path)
    assert "never loaded" in said
    assert "save_file" in said


def test_raw_pytorch_files_are_refused_by_their_bytes(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "archive")
    assert "save_file" in refused(tmp_path / "archive", tmp_path)
    torch.save({"x": torch.ones(1)}, tmp_path / "archive", _use_new_zipfile_serialization=False)
    assert "save_file" in refused(tmp_path / "archive", tmp_path)


def test_a_file_of_mlx_is_refused(tmp_path):
    entries = {CONFIG: b"{}", "adapters.safetensors": b"x"}
    assert "mlx-lm" in refused(make("zip", tmp_path / "archive", entries), tmp_path)


def test_a_bare_safetensors_file_lacks_its_config(tmp_path, files):
    (tmp_path / "archive").write_bytes(files[TENSORS])
    said = refused(tmp_path / "archive", tmp_path)
    assert said == "this is a bare .safetensors file, and its adapter_config.json is needed too"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "an empty file"),
        (b"hello", "not a zip, tar or tar.gz"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"BZh91AY", "a bzip2 file"),
        (b"\xfd7zXZ\0", "an xz file"),
        (b"\x28\xb5\x2f\xfd", "a zstandard file"),
        (b'{"peft_type": 1}', "a JSON file"),
    ],
)
def test_other_files_are_told_apart(tmp_path, data, said):
    (tmp_path / "archive").write_bytes(data)
    assert said in refused(tmp_path / "archive", tmp_path)


def test_an_archive_over_the_bound(tmp_path, files):
    archive = make("tar", tmp_path / "archive", files)
    said = refused(archive, tmp_path, "adapter_upload_too_large", bound=1000)
    assert "the bound is 1000" in said


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_unpacking_over_the_bound(tmp_path, files, kind):
    entries = files | {TENSORS: os.urandom(4096) * 40}
    archive = make(kind, tmp_path / "archive", entries)
    refused(archive, tmp_path, "adapter_upload_too_large", bound=max(archive.stat().st_size, 100_000))


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", [TENSORS, "README.md"])
def test_bombs(tmp_path, files, kind, name):
    """Under another name a bomb costs a zip nothing: it is never opened. A tar.gz has to be read past it."""
    archive = make(kind, tmp_path / "archive", files | {name: bytes(8 * 1024 * 1024)})
    if kind == "zip" and name == "README.md":
        assert unpacked(archive, tmp_path) == files
    else:
        assert "more than 100 times its size" in refused(archive, tmp_path)


def test_a_zip_that_lies_about_its_sizes(tmp_path, files):
    archive = write_zip(tmp_path / "archive", files | {TENSORS: bytes(8 * 1024 * 1024)})
    data = archive.read_bytes()
    archive.write_bytes(data.replace(struct.pack("<I", 8 * 1024 * 1024), struct.pack("<I", 10)))
    refused(archive, tmp_path)


def test_a_tar_that_declares_ten_gigabytes(tmp_path):
    info = tarfile.TarInfo(TENSORS)
    info.size = 10 * 2**30
    (tmp_path / "archive").write_bytes(info.tobuf() + b"x" * 1024)
    assert "damaged or cut short" in refused(tmp_path / "archive", tmp_path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_tar_whose_header_is_megabytes(tmp_path, kind):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 8 * 2**20
    (tmp_path / "archive").write_bytes(info.tobuf() + b"1" * (8 * 2**20))
    assert "bytes of headers" in refused(tmp_path / "archive", tmp_path)


def test_a_zip_whose_directory_is_megabytes(tmp_path, files):
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        for number in range(12_000):
            archive.writestr(zipfile.ZipInfo(f"{number:064}"), b"")
    assert "its directory has more than" in refused(tmp_path / "archive", tmp_path)


@KINDS
def test_too_many_entries(tmp_path, files, kind):
    entries = files | {f"{number}.txt": b"" for number in range(63)}
    assert "more than 64 entries" in refused(make(kind, tmp_path / "archive", entries), tmp_path)


def zip64(data: bytes, directory: int) -> bytes:
    """A zip with the end records of a zip64, which say that its directory has so many bytes."""
    place = data.rfind(b"PK\x05\x06")
    entries, size, start = struct.unpack("<HII", data[place + 10 : place + 20])
    record = struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, directory or size, start
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, place, 1)
    return data[:place] + record + locator + data[place:]


def test_zip64(tmp_path, files):
    data = write_zip(tmp_path / "archive", files).read_bytes()
    (tmp_path / "archive").write_bytes(zip64(data, 0))
    assert unpacked(tmp_path / "archive", tmp_path) == files


def test_a_zip64_whose_directory_is_gigabytes(tmp_path, files):
    data = write_zip(tmp_path / "archive", files).read_bytes()
    (tmp_path / "archive").write_bytes(zip64(data, 2**33))
    assert "its directory has more than" in refused(tmp_path / "archive", tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_of_zip(tmp_path, files, method):
    with zipfile.ZipFile(tmp_path / "archive", "w", method) as archive:
        archive.writestr(CONFIG, "{}")
    said = refused(tmp_path / "archive", tmp_path)
    assert "neither stored nor deflated; make the archive with zip's own compression" in said
    assert "damaged" not in said


def test_an_encrypted_zip(tmp_path, files):
    data = bytearray(write_zip(tmp_path / "archive", files).read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(magic) + offset] |= 1
    (tmp_path / "archive").write_bytes(bytes(data))
    said = refused(tmp_path / "archive", tmp_path)
    assert "is encrypted; make the archive without a password" in said
    assert "damaged" not in said


def test_a_path_that_is_no_text_can_be_told_of(tmp_path, files):
    entries = {"\udcff/" + CONFIG: files[CONFIG], "b/" + TENSORS: files[TENSORS]}
    said = refused(make("tar", tmp_path / "archive", entries), tmp_path)
    assert r"'\udcff/adapter_config.json' and 'b/adapter_model.safetensors'" in said
    (tmp_path / "into" / CONFIG).unlink()
    (tmp_path / "into" / TENSORS).unlink()
    said = refused(make("tar", tmp_path / "archive", {**entries, "\udcff/x/" + CONFIG: b""}), tmp_path)
    assert "twice" in said
    said.encode()


@KINDS
def test_every_truncation_is_refused(tmp_path, files, kind):
    whole = make(kind, tmp_path / "archive", files).read_bytes()
    end = len(whole) if kind != "tar" else 512 * 3 + len(files[CONFIG]) + len(files[TENSORS])
    for cut in range(0, end, max(1, end // 40)):
        (tmp_path / "archive").write_bytes(whole[:cut])
        for path in (tmp_path / "into").glob("*"):
            path.unlink()
        refused(tmp_path / "archive", tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_flipped_bit_is_seen_by_the_checksum(tmp_path, files, kind):
    archive = make(kind, tmp_path / "archive", {TENSORS: os.urandom(100_000), CONFIG: files[CONFIG]})
    data = bytearray(archive.read_bytes())
    data[50_000] ^= 1
    archive.write_bytes(bytes(data))
    assert "damaged" in refused(archive, tmp_path)


def test_a_zip_whose_directory_points_before_its_start(tmp_path, files):
    archive = make("zip", tmp_path / "archive", files)
    data = bytearray(archive.read_bytes())
    place = len(data) - 22 + 16  # of the directory's offset, in the end record
    offset = int.from_bytes(data[place : place + 4], "little")
    data[place : place + 4] = (offset + 1).to_bytes(4, "little")  # a reader then takes 1 off every place
    archive.write_bytes(bytes(data))
    said = refused(archive, tmp_path)
    assert "damaged" in said
    assert "before the archive" in said


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["zip", "tar", "tar.gz"]))
def test_a_damaged_archive_is_refused_or_whole_but_never_breaks(tmp_path, files, data, kind):
    whole = bytearray(make(kind, tmp_path / "archive", files).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "archive").write_bytes(bytes(whole))
    for path in (tmp_path / "into").glob("*"):
        path.unlink()
    try:
        found = unpacked(tmp_path / "archive", tmp_path)
    except AdapterError:
        return
    assert found.keys() == files.keys()
    if kind != "tar":
        assert found == files


@given(
    data=st.binary(max_size=600), magic=st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08"])
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_is_refused(tmp_path, data, magic):
    (tmp_path / "archive").write_bytes(magic + data)
    with pytest.raises(AdapterError):
        unpacked(tmp_path / "archive", tmp_path)


def test_a_gzip_of_something_else(tmp_path):
    (tmp_path / "archive").write_bytes(gzip.compress(b"hello" * 1000))
    assert "damaged" in refused(tmp_path / "archive", tmp_path)


def test_a_folder_is_copied_through_links(tmp_path, files):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in files:
        (linked / name).symlink_to(tmp_path / "original" / name)
    (tmp_path / "into").mkdir()
    copy_folder(linked, tmp_path / "into")
    assert adapter_files(tmp_path / "into") == files
    assert not (tmp_path / "into" / CONFIG).is_symlink()


def test_folders_without_an_adapter(tmp_path):
    with pytest.raises(AdapterError, match="is not a folder"):
        copy_folder(tmp_path / "none", tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(
        AdapterError, match=r"no adapter_config\.json and no adapter_model\.safetensors, but 'adapter_model"
    ):
        copy_folder(tmp_path / "here", tmp_path)


@pytest.mark.parametrize("names", [["legal"], ["checkpoint-10", "checkpoint-900"], list("abcdefg")])
def test_a_folder_of_adapters_says_which_it_holds(tmp_path, names):
    """What peft writes for several adapters, and a Trainer for its checkpoints."""
    for name in names:
        write_folder(tmp_path / "out" / name)
    (tmp_path / "out" / "README.md").write_text("words")
    with pytest.raises(AdapterError) as caught:
        copy_folder(tmp_path / "out", tmp_path)
    shown = ", ".join(map(repr, names[:5])) + (" and 2 more" if len(names) > 5 else "")
    assert str(caught.value) == (f"{tmp_path / 'out'} is no adapter itself; name one that is in it: {shown}")


def test_a_folder_that_lacks_one_file_is_meant_itself(tmp_path):
    """An adapter without its config, with another of its checkpoints in it, is not for the other to replace."""
    folder = write_folder(tmp_path / "out")
    write_folder(folder / "checkpoint-10")
    (folder / CONFIG).unlink()
    with pytest.raises(
        AdapterError, match=r"holds no adapter_config\.json, but 'adapter_model\.safetensors'"
    ):
        copy_folder(folder, tmp_path)
