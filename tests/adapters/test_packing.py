"""A folder is sent as a tar that the server's own reader takes, without a copy and with its length known before."""

import io
import tarfile

import pytest

from adapters.errors import AdapterError
from adapters.packing import pack
from adapters.sources import unpack

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def folder(path, config=b"{}", tensors=b"x" * 700):
    path.mkdir()
    (path / CONFIG).write_bytes(config)
    (path / TENSORS).write_bytes(tensors)
    (path / "README.md").write_text("not sent")
    return path


@pytest.mark.parametrize("size", [1, 511, 512, 513, 3 * 1024 * 1024 + 5])
def test_what_is_packed_unpacks_to_the_same_bytes(tmp_path, size):
    source = folder(tmp_path / "legal", b'{"r": 8}', b"t" * size)
    packed = pack(source)
    data = b"".join(packed)
    assert len(packed) == len(data)
    (tmp_path / "archive").write_bytes(data)
    (tmp_path / "into").mkdir()
    unpack(tmp_path / "archive", tmp_path / "into", 10**8)
    assert (tmp_path / "into" / CONFIG).read_bytes() == b'{"r": 8}'
    assert (tmp_path / "into" / TENSORS).read_bytes() == b"t" * size
    assert sorted(path.name for path in (tmp_path / "into").iterdir()) == [CONFIG, TENSORS]


def test_a_file_of_more_than_eight_gigabytes_has_a_header_too(tmp_path):
    source = folder(tmp_path / "legal")
    with (source / TENSORS).open("r+b") as file:
        file.truncate(9 * 1024**3)  # a hole, no bytes on the disk
    packed = pack(source)
    header = packed.parts[1][0]
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == 9 * 1024**3
    assert len(packed) > 9 * 1024**3


def test_links_are_followed_and_not_sent(tmp_path):
    source = folder(tmp_path / "blobs", tensors=b"weights")
    links = tmp_path / "snapshot"
    links.mkdir()
    for name in (CONFIG, TENSORS):
        (links / name).symlink_to(source / name)
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack(links)))) as archive:
        assert [entry.isreg() for entry in archive] == [True, True]
        assert archive.extractfile(TENSORS).read() == b"weights"


def test_an_archive_is_sent_as_it_is(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"".join(pack(folder(tmp_path / "legal"))))
    assert b"".join(pack(tmp_path / "a.tar")) == (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and more")
    assert b"".join(pack(tmp_path / "a.zip")) == b"PK\x03\x04 and more"


@pytest.mark.parametrize("change", [b"", b"x" * 699, b"x" * 701])
def test_a_file_that_changes_while_it_is_sent(tmp_path, change):
    source = folder(tmp_path / "legal")
    packed = pack(source)
    (source / TENSORS).write_bytes(change)
    with pytest.raises(AdapterError, match="was written to while it was sent"):
        b"".join(packed)


def test_what_is_no_adapter_is_told_before_a_byte_is_sent(tmp_path):
    with pytest.raises(AdapterError, match="is not a folder"):
        pack(tmp_path / "nowhere")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").touch()
    with pytest.raises(AdapterError, match="pickle is never loaded"):
        pack(tmp_path / "pickled")
    (tmp_path / "bare.safetensors").write_bytes(bytes(600))
    with pytest.raises(AdapterError, match="name the folder that holds"):
        pack(tmp_path / "bare.safetensors")
