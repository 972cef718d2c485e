"""Opens a .safetensors file that nobody vouches for: bounds its header before the library checks it, maps the rest.

Knows nothing of adapters. Nothing here, or anywhere in this package, ever unpickles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.errors import AdapterError, Finding
from adapters.magic import CONVERTER, looks_like_pickle, looks_like_safetensors

TENSORS = 100_000
LFS_POINTER = b"version h"  # how "version https://git-lfs.github.com/spec/v1" begins

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of tensors that can be read


@dataclass(frozen=True, slots=True)
class Header:
    """One tensor as the file's header tells of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file whose header is sound. Its tensors are views of one mapping, which goes with the last of them.

    The library's own `get_tensor` leaves two numbers in memory for each tensor that it reads, for ever (0.6 to 0.9):
    a server loads adapters for months.
    """

    headers: tuple[Header, ...]
    _mapping: Tensor  # [bytes of the file] uint8
    _places: Mapping[str, tuple[int, ...]]

    def tensor(self, header: Header) -> Tensor:
        """Its values, of one of `DTYPES`."""
        first, end = self._places[header.name]
        values = self._mapping[first:end]
        dtype = DTYPES[header.dtype]
        if first % dtype.itemsize:  # of old writers
            values = values.clone()
        return values.view(dtype).view(header.shape)


def header_length(path: Path) -> int:
    """Of the file's header. Refuses what is not safetensors, by its first bytes, and a header too long or cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if looks_like_safetensors(head):
        if length + 8 > size:
            raise refused(
                path, f"is cut short: its header takes {length} bytes, the file has {size}", "send it again"
            )
        return length
    if head[:4] == b"PK\x03\x04" or looks_like_pickle(head):
        raise refused(path, "is a PyTorch pickle, which is never loaded, under another name", CONVERTER)
    if head[:4] == b"GGUF":
        raise refused(path, "is a GGUF file", "send the peft adapter it was made from")
    if head == LFS_POINTER:
        problem = "is not a safetensors file but the pointer that Git LFS keeps in its place"
        raise refused(path, problem, "fetch the file itself: git lfs pull")
    if len(head) < 9:
        raise refused(path, f"is cut short: it has {size} bytes", "send it again")
    raise refused(path, "is not a safetensors file: it starts with no header length and JSON header")


def open_tensors(path: Path) -> TensorFile:
    """The file, mapped, once the library has found its header sound; its complaints become findings."""
    length = header_length(path)
    try:
        with safe_open(path, framework="pt") as tensors:
            names = tensors.keys()
    except (SafetensorError, UnicodeError) as error:
        raise refused(path, f"is damaged: {error}", "save and send it again") from error
    if len(names) > TENSORS:
        raise refused(path, f"has more than {TENSORS} tensors")
    with path.open("rb") as file:
        file.seek(8)
        told = json.loads(file.read(length))
    headers = tuple(Header(name, tuple(told[name]["shape"]), told[name]["dtype"]) for name in names)
    mapping = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    places = {name: tuple(8 + length + at for at in told[name]["data_offsets"]) for name in names}
    return TensorFile(headers, mapping, places)


def refused(path: Path, problem: str, cure: str = "") -> AdapterError:
    """The one finding about a file as an error."""
    return AdapterError("invalid_adapter", f"{path.name} {problem}", (Finding(path.name, problem, cure),))
