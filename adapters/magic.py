"""What a file is, by its first bytes. Needs no tensor library."""

from __future__ import annotations

HEADER_BYTES = 32 * 1024 * 1024  # of safetensors; the library alone would parse 100 MB of JSON

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
