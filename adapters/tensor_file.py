"""Opens a .safetensors file that nobody vouches for: bounds its header before the library parses it.

Knows nothing of adapters. Nothing here, or anywhere in this package, ever unpickles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from adapters.errors import AdapterError, Finding

HEADER_BYTES = 32 * 1024 * 1024  # the library alone would parse 100 MB of JSON
TENSORS = 100_000

CONVERTER = (
    'convert it once: python -c "import torch; from safetensors.torch import save_file; '
    "save_file({k: v.clone() for k, v in torch.load('adapter_model.bin', map_location='cpu', "
    "weights_only=True).items()}, 'adapter_model.safetensors')\""
)


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that starts so could be safetensors: a sane header length, then a JSON object."""
    return len(head) >= 9 and int.from_bytes(head[:8], "little") <= HEADER_BYTES and head[8:9] == b"{"


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file that starts so is a raw pickle, as old PyTorch files are."""
    return head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}


def check_header(path: Path) -> None:
    """Refuse what is not safetensors, by its first bytes, and a header that is too long or cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if looks_like_safetensors(head):
        if length + 8 > size:
            raise refused(
                path, f"is cut short: its header takes {length} bytes, the file has {size}", "send it again"
            )
        return
    if head[:4] == b"PK\x03\x04" or looks_like_pickle(head):
        raise refused(path, "is a PyTorch pickle, which is never loaded, under another name", CONVERTER)
    if head[:4] == b"GGUF":
        raise refused(path, "is a GGUF file", "send the peft adapter it was made from")
    if len(head) < 9:
        raise refused(path, f"is cut short: it has {size} bytes", "send it again")
    raise refused(path, "is not a safetensors file: it starts with no header length and JSON header")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The library's reader over a mapped file; its complaints become findings."""
    check_header(path)
    try:
        with safe_open(path, framework="pt") as tensors:
            if len(tensors.keys()) > TENSORS:
                raise refused(path, f"has more than {TENSORS} tensors")
            yield tensors
    except (SafetensorError, UnicodeError) as error:
        raise refused(path, f"is damaged: {error}", "save and send it again") from error


def refused(path: Path, problem: str, cure: str = "") -> AdapterError:
    """The one finding about a file as an error."""
    return AdapterError("invalid_adapter", f"{path.name} {problem}", (Finding(path.name, problem, cure),))
