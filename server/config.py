"""The settings, once: every flag, LORAPLEX_* variable and YAML key is made from a field of `Settings`.

The only place that reads the environment. Knows nothing of what the settings do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

ENV_PREFIX = "LORAPLEX_"
CONFIG_FILE = "config"  # the flag that names the YAML file, and the only one that is no field

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
MIB, GIB = 1024**2, 1024**3


class SettingsError(Exception):
    """One setting is wrong; the message is one line that names it and the cure."""


class LoraModule(NamedTuple):
    """An adapter to register at start: `--lora-modules legal=/srv/legal`."""

    name: str
    path: Path


def _bytes(value: object) -> object:
    """A size in bytes, from 512MiB, 1GiB, 2GB or a plain number."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise PydanticCustomError("size", "must be a size such as 512MiB, 1GiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _modules(value: object) -> object:
    """Adapters from `a=/x,b=/y`, from a list of `a=/x` or from a mapping."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part]
    if isinstance(value, Mapping):
        value = [f"{name}={path}" for name, path in value.items()]
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("modules", "must be given as name=path")
    found = []
    for item in value:
        name, separator, path = item.partition("=") if isinstance(item, str) else ("", "", "")
        if isinstance(item, LoraModule):
            name, separator, path = item.name, "=", str(item.path)
        if not (name and separator and path):
            raise PydanticCustomError(
                "modules", "must be given as name=path, got {item}", {"item": str(item)}
            )
        found.append(LoraModule(name, Path(path)))
    if len({module.name for module in found}) < len(found):
        raise PydanticCustomError("modules", "must not name one adapter twice")
    return tuple(found)


def _quantization(value: object) -> object:
    return "nf4" if value == "bitsandbytes" else value


Positive = Annotated[int, Field(ge=1)]
ByteSize = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]


class Settings(BaseModel):
    """How this server was asked to run. Frozen; sizes found at run time live with their owners."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="the base model: a checkpoint folder or a Hugging Face name")
    served_model_name: str | None = Field(None, description="the name clients use for the base")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="type of activations and KV")
    quantization: Annotated[Literal["nf4", "int8", "none"], BeforeValidator(_quantization)] = Field(
        "nf4", description="how the base's weights are held (bitsandbytes means nf4)"
    )
    linear_backend: Literal["exact", "bitsandbytes"] = Field(
        "exact", description="who multiplies by the base"
    )
    cpu_math: Literal["fp32", "int8"] = Field(
        "fp32", description="arithmetic of products with NF4 weights on the CPU; int8 is faster and not exact"
    )
    max_model_len: Positive | None = Field(None, description="most tokens of prompt and completion together")
    block_size: Positive = Field(16, description="KV positions per block")
    max_num_seqs: Positive = Field(64, description="most sequences in one step")
    max_num_batched_tokens: Positive = Field(512, description="most tokens in one step")
    prefill_chunk: Positive = Field(128, description="tokens of a prompt that are computed together")
    kv_cache_memory_bytes: ByteSize | None = Field(
        None, description="memory for the KV cache; planned from free memory if not given"
    )
    adapter_memory_bytes: ByteSize = Field(GIB, description="memory for adapters on the device")
    adapter_host_memory_bytes: ByteSize = Field(4 * GIB, description="memory for adapters on the host")
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of adapters' weights"
    )
    max_loras: Positive | None = Field(
        None, description="room for this many adapters of rank 16 on the device"
    )
    max_lora_rank: Positive = Field(256, description="largest rank that is accepted")
    max_upload_bytes: ByteSize = Field(2 * GIB, description="largest upload of an adapter")
    adapter_store: Path | None = Field(None, description="folder in which adapters are kept")
    keep_versions: Annotated[int, Field(ge=0)] = Field(
        5, description="earlier versions of an adapter that are kept to roll back to"
    )
    quantized_cache: Path | None = Field(None, description="folder in which quantized bases are kept")
    lora_modules: Annotated[tuple[LoraModule, ...], BeforeValidator(_modules)] = Field(
        (), description="an adapter to register at start, as name=path; may be repeated"
    )
    max_queued_requests: Positive = Field(
        256, description="most sequences that may wait; more are refused (429)"
    )
    threads: Positive | None = Field(
        None,
        description="CPU threads for the model; if not given all cores, or 1 for a base under 50 M parameters",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")
    shutdown_timeout: float = Field(
        30, ge=0, allow_inf_nan=False, description="seconds in which running requests may end after SIGTERM"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the base model")

    @model_validator(mode="after")
    def _chunk_fits_step(self) -> Self:
        if self.prefill_chunk > self.max_num_batched_tokens:
            raise PydanticCustomError(
                "prefill_chunk",
                "--prefill-chunk {chunk} must not pass --max-num-batched-tokens {step}; lower the first or "
                "raise the second",
                {"chunk": self.prefill_chunk, "step": self.max_num_batched_tokens},
            )
        return self

    @property
    def base_name(self) -> str:
        """What clients call the base: the name asked for, or the last part of the checkpoint's."""
        return self.served_model_name or self.model.rstrip("/").rpartition("/")[2] or self.model

    @property
    def store_folder(self) -> Path:
        return self.adapter_store or _user_folder("XDG_DATA_HOME", ".local/share") / "store"

    @property
    def quantized_folder(self) -> Path:
        return self.quantized_cache or _user_folder("XDG_CACHE_HOME", ".cache") / "quantized"


def load_settings(flags: Mapping[str, object], config: Path | None = None) -> Settings:
    """The settings of this process: flags win over environment, file and defaults, in this order."""
    sources: dict[str, tuple[str, object]] = {}
    for name, label, value in [*_from_file(config), *_from_environment()]:
        sources[name] = (label, value)
    sources |= {name: (flag(name), value) for name, value in flags.items()}
    try:
        return Settings.model_validate({name: value for name, (_, value) in sources.items()})
    except ValidationError as error:
        details = error.errors(include_url=False)
        labels = {name: label for name, (label, _) in sources.items()}
        raise SettingsError("; ".join(dict.fromkeys(_line(detail, labels) for detail in details))) from None


def flag(name: str) -> str:
    """How a field is spelled on the command line."""
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")


def _from_file(path: Path | None) -> Iterator[tuple[str, str, object]]:
    if path is None:
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"--config {path}: cannot be read as YAML: {reason}") from None
    if not isinstance(content, dict | None):
        raise SettingsError(f"--config {path}: must hold a mapping of flags to values, such as `port: 8000`")
    for key, value in (content or {}).items():
        name = str(key).replace("-", "_")
        if name not in Settings.model_fields:
            raise SettingsError(
                f"{key} in {path}: no such setting; the keys are the flags without their dashes"
            )
        if value is not None:
            yield name, f"{key} in {path}", value


def _from_environment() -> Iterator[tuple[str, str, object]]:
    for name in Settings.model_fields:
        variable = ENV_PREFIX + name.upper()
        if value := os.environ.get(variable):
            yield name, variable, value


def _line(detail: ErrorDetails, labels: Mapping[str, str]) -> str:
    """One pydantic error as words: where the value came from, and what it must be."""
    if not detail["loc"]:
        return detail["msg"]
    name = str(detail["loc"][0])
    label = labels.get(name, flag(name))
    if detail["type"] == "missing":
        return f"{label} is missing; name the base model, for example `loraplex serve ./my-base`"
    message = detail["msg"].replace("Input should be", "must be")
    got = "" if detail["type"] == "modules" else f", got {str(detail['input'])[:80]!r}"
    return f"{label}: {message[:1].lower()}{message[1:]}{got}"


def _user_folder(variable: str, fallback: str) -> Path:
    """Our folder among the user's, as the XDG base directory specification places it."""
    base: Any = os.environ.get(variable)
    return (Path(base) if base else Path.home() / fallback) / "loraplex"
