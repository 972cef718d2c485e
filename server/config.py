"""The settings, once: every flag, LORAPLEX_* variable and YAML key is made from a field of `Settings`.

The only place that reads the environment. Knows nothing of what the settings do.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from server.other_flags import ALIASES, ALWAYS, KNOWN, REFUSED

ENV_PREFIX = "LORAPLEX_"
CONFIG_FILE = "config"  # the flag that names the YAML file, and the only one that is no field

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_KEY = re.compile(r"[!-+\--~]+")  # what a header can carry: printable ASCII, here without commas
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
MIB, GIB = 1024**2, 1024**3


DEFAULT_URL = "http://127.0.0.1:8000"


class SettingsError(Exception):
    """One setting is wrong; the message is one line that names it and the cure."""


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
            raise PydanticCustomError("modules", "is no JSON: {reason}", {"reason": str(error)}) from None
        return value if isinstance(value, list) else [value]
    return [part for part in text.split(",") if part]


def _names(value: object) -> object:
    """Names from `a,b` or a list of them."""
    if value is None:
        return ()
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _keys(value: object) -> tuple[SecretStr, ...]:
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


def _keys_in(path: Path, label: str) -> tuple[SecretStr, ...]:
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
    return _keys(lines)


def _quantization(value: object) -> object:
    return "nf4" if value == "bitsandbytes" else value


Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
ByteSize = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]
Keys = Annotated[tuple[SecretStr, ...], BeforeValidator(_keys)]


class Settings(BaseModel):
    """How this server was asked to run. Frozen; sizes found at run time live with their owners."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="the base model: a checkpoint folder or a Hugging Face name")
    served_model_name: Annotated[tuple[Name, ...], BeforeValidator(_names)] = Field(
        (), description="the name clients use for the base, or several; answers carry the first"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    api_key: Keys = Field((), description="a key that clients must send; may be repeated")
    api_key_file: Path | None = Field(None, description="file of such keys, one a line")
    admin_api_key: Keys = Field(
        (), description="a key that may change adapters, and all else; may be repeated"
    )
    admin_api_key_file: Path | None = Field(None, description="file of such keys, one a line")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="type of activations and KV")
    quantization: Annotated[Literal["nf4", "int8", "none"], BeforeValidator(_quantization)] = Field(
        "nf4", description="how the base's weights are held (bitsandbytes means nf4)"
    )
    linear_backend: Literal["exact", "bitsandbytes"] = Field(
        "exact", description="who multiplies by the base"
    )
    batch_invariant: bool = Field(
        False,
        description="on a GPU, give a row the same bits alone and among others, which costs time; on a CPU it is so",
    )
    enforce_eager: bool = Field(
        False, description="run every step as it comes, without CUDA graphs captured at start"
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
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="share of the GPU's memory that all of it may take; the KV cache gets what is left of that",
    )
    adapter_memory_bytes: ByteSize = Field(GIB, description="memory for adapters on the device")
    adapter_host_memory_bytes: ByteSize = Field(
        4 * GIB, description="memory for adapters on the host; on the CPU, bytes of files that stay mapped"
    )
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of adapters' weights"
    )
    max_loras: Positive | None = Field(
        None, description="room for this many adapters of rank 16 on the device"
    )
    max_cpu_loras: Positive | None = Field(
        None, description="room for this many adapters of rank 16 on the host"
    )
    max_lora_rank: Positive = Field(256, description="largest rank that is accepted")
    max_upload_bytes: ByteSize = Field(2 * GIB, description="largest upload of an adapter")
    adapter_store: Path | None = Field(None, description="folder in which adapters are kept")
    adapter_store_bytes: ByteSize | None = Field(
        None,
        description="most bytes that adapters take in that folder; as many as its disk holds if not given",
    )
    keep_versions: Annotated[int, Field(ge=0)] = Field(
        5, description="earlier versions of an adapter that are kept to roll back to"
    )
    quantized_cache: Path | None = Field(None, description="folder in which quantized bases are kept")
    lora_modules: Annotated[tuple[LoraModule, ...], BeforeValidator(_modules)] = Field(
        (), description='adapters to register at start, each as name=path or {"name": ..., "path": ...}'
    )
    chat_template: Path | None = Field(
        None, description="file with the chat template to use in place of the model's own"
    )
    seed: int | None = Field(
        None,
        description="where requests without a seed draw theirs from: the same requests in the same order give the same "
        "texts; not predictable if not given",
    )
    max_queued_requests: Positive = Field(
        256, description="most sequences that may wait; more are refused (429)"
    )
    threads: Positive | None = Field(
        None,
        description="CPU threads for the model; if not given all cores, or 1 for a base under 50 M parameters",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")
    enable_log_requests: bool = Field(
        False,
        description="log a line for each request that has ended, probes left out; never what was said in it",
    )
    root_path: str = Field(
        "", description="path under which a proxy before this server shows it, such as /llm"
    )
    ssl_certfile: Path | None = Field(None, description="certificate (PEM) to serve HTTPS with")
    ssl_keyfile: Path | None = Field(None, description="key (PEM) of that certificate")
    shutdown_timeout: float = Field(
        30, ge=0, allow_inf_nan=False, description="seconds in which running requests may end after SIGTERM"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the base model")

    @model_validator(mode="before")
    @classmethod
    def _keys_of_files(cls, given: dict[str, object]) -> dict[str, object]:
        """Read the files of keys, so that the rest of the process need not know of them."""
        read = {
            name: (*_keys(given.get(name, ())), *_keys_in(Path(str(path)), flag(f"{name}_file")))
            for name in ("api_key", "admin_api_key")
            if (path := given.get(f"{name}_file"))
        }
        return given | read

    @model_validator(mode="after")
    def _keys_differ(self) -> Self:
        if set(self.api_key) & set(self.admin_api_key):
            problem = "--admin-api-key must differ from every --api-key, or all clients could change adapters"
            raise PydanticCustomError("keys", problem)
        return self

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

    @model_validator(mode="after")
    def _sizes_are_said_once(self) -> Self:
        pairs = (
            ("max_loras", "adapter_memory_bytes"),
            ("max_cpu_loras", "adapter_host_memory_bytes"),
            ("gpu_memory_utilization", "kv_cache_memory_bytes"),
        )
        for one, other in pairs:
            if {one, other} <= self.model_fields_set and None not in (
                getattr(self, one),
                getattr(self, other),
            ):
                message = "{one} and {other} say the same thing in two ways; give one of them"
                raise PydanticCustomError("sizes", message, {"one": flag(one), "other": flag(other)})
        return self

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise PydanticCustomError("ssl", "--ssl-certfile and --ssl-keyfile go together; give both")
        return self

    @model_validator(mode="after")
    def _modules_are_for_this_base(self) -> Self:
        for name, _, base in self.lora_modules:
            if base is not None and base not in self.base_names:
                raise PydanticCustomError(
                    "modules",
                    "--lora-modules: {name} is for the base {base}, and this is {ours}",
                    {"name": name, "base": base, "ours": self.base_name},
                )
        return self

    @property
    def base_name(self) -> str:
        """What answers call the base: the first name asked for, or the last part of the checkpoint's."""
        asked = next(iter(self.served_model_name), None)
        return asked or self.model.rstrip("/").rpartition("/")[2] or self.model

    @cached_property
    def base_names(self) -> frozenset[str]:
        """What a client may call the base: a served name, or the model it was loaded from."""
        return frozenset({self.base_name, *self.served_model_name, self.model})

    @property
    def store_folder(self) -> Path:
        return self.adapter_store or _user_folder("XDG_DATA_HOME", ".local/share") / "store"

    @property
    def quantized_folder(self) -> Path:
        return self.quantized_cache or _user_folder("XDG_CACHE_HOME", ".cache") / "quantized"


def load_settings(flags: Mapping[str, object], config: Path | None = None) -> Settings:
    """The settings of this process: flags win over environment, file and defaults, in this order."""
    typed = ((name, flag(name), value) for name, value in flags.items())
    sources = _by_our_names(_from_file(config))
    sources |= _by_our_names(_from_environment())
    sources |= _by_our_names(typed)
    try:
        return Settings.model_validate({name: value for name, (_, value) in sources.items()})
    except ValidationError as error:
        details = error.errors(include_url=False)
        labels = {name: label for name, (label, _) in sources.items()}
        raise SettingsError("; ".join(dict.fromkeys(_line(detail, labels) for detail in details))) from None


def _by_our_names(given: Iterable[tuple[str, str, object]]) -> dict[str, tuple[str, object]]:
    """What one source says, each with its label; raises on what cannot be honoured, or is said twice."""
    found: dict[str, tuple[str, object]] = {}
    for name, label, value in given:
        if name in REFUSED:
            raise SettingsError(f"{label}: {REFUSED[name]}")
        if name in ALWAYS:
            if str(value).lower() not in ("true", "1", "yes", "on"):
                raise SettingsError(f"{label}: {ALWAYS[name]}, which cannot be turned off; leave it out")
            continue
        field = ALIASES.get(name, name)
        if field in found:
            raise SettingsError(f"{found[field][0]} and {label} are one setting; give one of them")
        found[field] = (label, value)
    return found


class ClientSettings(NamedTuple):
    """The server that a command of ours talks to."""

    url: str
    api_key: str | None


def load_client_settings(url: str | None, api_key: str | None) -> ClientSettings:
    """Where the server is and the key for it: flags win over LORAPLEX_URL and LORAPLEX_ADMIN_API_KEY or _API_KEY."""
    label = "--url" if url else "LORAPLEX_URL"
    found = url or os.environ.get("LORAPLEX_URL") or DEFAULT_URL
    if not re.match(r"https?://[^/]", found):
        raise SettingsError(f"{label}: must be like {DEFAULT_URL}, got {found!r}")
    keys = (api_key, os.environ.get("LORAPLEX_ADMIN_API_KEY"), os.environ.get("LORAPLEX_API_KEY"))
    return ClientSettings(found.rstrip("/").removesuffix("/v1"), next(filter(None, keys), None))


def size_text(nbytes: float) -> str:
    """A size for people: 1.5 GiB, 20.0 MiB, 0.4 KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes / 1024:.1f} KiB"


def flag(name: str) -> str:
    """How a field is spelled on the command line."""
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")


def _from_file(path: Path | None) -> Iterator[tuple[str, str, object]]:
    if path is None:
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:  # its own words quote the file, which may hold a key
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SettingsError(
            f"--config {path}: cannot be read as YAML: line {line}: {error.problem}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"--config {path}: cannot be read as YAML: {reason}") from None
    if not isinstance(content, dict | None):
        raise SettingsError(f"--config {path}: must hold a mapping of flags to values, such as `port: 8000`")
    for key, value in (content or {}).items():
        name = str(key).replace("-", "_")
        if name not in Settings.model_fields and name not in KNOWN:
            raise SettingsError(
                f"{key} in {path}: no such setting; the keys are the flags without their dashes"
            )
        if value is not None:
            yield name, f"{key} in {path}", value


def _from_environment() -> Iterator[tuple[str, str, object]]:
    for name in (*Settings.model_fields, *sorted(KNOWN)):
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
        if "served_model_name" in labels:
            return f"{label} is missing; put it first: --served-model-name takes every word that follows"
        return f"{label} is missing; name the base model, for example `loraplex serve ./my-base`"
    message = detail["msg"].replace("Input should be", "must be")
    got = "" if detail["type"] in ("modules", "keys") else f", got {str(detail['input'])[:80]!r}"
    return f"{label}: {message[:1].lower()}{message[1:]}{got}"


def _user_folder(variable: str, fallback: str) -> Path:
    """Our folder among the user's, as the XDG base directory specification places it."""
    base: Any = os.environ.get(variable)
    return (Path(base) if base else Path.home() / fallback) / "loraplex"
