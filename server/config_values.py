"""What the text of a setting stands for: sizes, names, keys, adapters.

Knows no setting by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_core import PydanticCustomError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_KEY = re.compile(r"[!-+\--~]+")  # what a header can carry: printable ASCII, here without commas
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
MIB, GIB = 1024**2, 1024**3


class LoraModule(NamedTuple):
    """An adapter to register at start: `--lora-modules legal=/srv/legal`."""

    name: str
    path: Path
    base_model_name: str | None = None  # the base that it is said to be for


def _bytes(value: object) -> object:
    """A size in bytes, from 512MiB, 1GiB, 2GB or a plain number."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise PydanticCustomError("size", "must be a size such as 512MiB, 1GiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _modules(value: object) -> object:
    """Adapters from `a=/x,b=/y`, from a mapping, or from a list of `a=/x` and of objects with name and path."""
    if isinstance(value, str):
        value = _list(value)
    if isinstance(value, Mapping):
        value = [f"{name}={path}" for name, path in value.items()]
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("modules", "must be given as name=path")
    found = [_module(item) for item in value]
    if len({module.name for module in found}) < len(found):
        raise PydanticCustomError("modules", "must not name one adapter twice")
    return tuple(found)


def _module(item: object) -> LoraModule:
    if isinstance(item, LoraModule):
        return item
    fields = item
    if isinstance(item, str):
        name, _, path = item.partition("=")
        fields = {"name": name, "path": path}
        if item.lstrip().startswith("{"):
            with suppress(ValueError):
                fields = json.loads(item)
    match fields:
        case {"name": str(name), "path": str(path), **rest} if name and path:
            base = rest.pop("base_model_name", None)
            if not rest and isinstance(base, str | None):
                return LoraModule(name, Path(path), base)
    form = "name=path" if isinstance(item, str) and "{" not in item else '{"name": ..., "path": ...}'
    raise PydanticCustomError(
        "modules", "must be given as {form}, got {item}", {"form": form, "item": str(item)}
    )


def _list(text: str) -> list[Any]:
    """Values from text: JSON, or separated by commas."""
    if text.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise PydanticCustomError(
                "modules", "is not valid JSON: {reason}", {"reason": str(error)}
            ) from None
        return value if isinstance(value, list) else [value]
    return [part for part in text.split(",") if part]


def _names(value: object) -> object:
    """Names from `a,b` or a list of them."""
    if value is None:
        return ()
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def keys_of(value: object) -> tuple[SecretStr, ...]:
    """API keys from `a,b` or a list of them; a wrong one is never repeated."""
    items = value if isinstance(value, list | tuple) else [value]
    found: list[str] = []
    for item in items:
        text = item.get_secret_value() if isinstance(item, SecretStr) else item
        parts = text.split(",") if isinstance(text, str) else [""]
        if not all(map(_KEY.fullmatch, parts)):
            raise PydanticCustomError("keys", "must be text of visible ASCII characters, in quotes in a file")
        found += parts
    return tuple(map(SecretStr, dict.fromkeys(found)))


def keys_in(path: Path, label: str) -> tuple[SecretStr, ...]:
    """The keys of a file, one a line."""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise PydanticCustomError(
            "keys",
            "{label} {path}: cannot be read: {reason}",
            {"label": label, "path": str(path), "reason": reason},
        ) from None
    if not lines:
        raise PydanticCustomError("keys", "{label} {path}: holds no key", {"label": label, "path": str(path)})
    return keys_of(lines)


def _quantization(value: object) -> object:
    return "nf4" if value == "bitsandbytes" else value


Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_names)]
Positive = Annotated[int, Field(ge=1)]
ByteSize = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]
Keys = Annotated[tuple[SecretStr, ...], BeforeValidator(keys_of)]
Modules = Annotated[tuple[LoraModule, ...], BeforeValidator(_modules)]
Quantization = Annotated[Literal["nf4", "int8", "none"], BeforeValidator(_quantization)]


def size_text(nbytes: float) -> str:
    """A size for people: 1.5 GiB, 20.0 MiB, 0.4 KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes / 1024:.1f} KiB"
