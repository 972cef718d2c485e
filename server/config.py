"""The settings, once: every flag, LORAPLEX_* variable and YAML key is made from a field of `Settings`.

Knows nothing of what the settings do, nor where they come from.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from adapters.records import NAME, NAME_RULE
from server.config_values import (
    GIB,
    ByteSize,
    Keys,
    Modules,
    Names,
    Positive,
    Quantization,
    keys_in,
    keys_of,
)

KV_TILE = 256  # `kernels.segments.KV_TILE`, which brings torch


class SettingsError(Exception):
    """One setting is wrong; the message is one line that names it and the cure."""


class Settings(BaseModel):
    """How this server was asked to run. Frozen; sizes found at run time live with their owners."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="the base model: a checkpoint folder or a Hugging Face name")
    served_model_name: Names = Field(
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
    quantization: Quantization = Field(
        "nf4", description="how the base's weights are held (bitsandbytes means nf4)"
    )
    linear_backend: Literal["exact", "bitsandbytes"] = Field(
        "exact", description="which kernels compute the base's linear layers"
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
    block_size: Positive = Field(16, description="KV positions per block, a power of two up to 256")
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
    lora_modules: Modules = Field(
        (), description='adapters to register at start, each as name=path or {"name": ..., "path": ...}'
    )
    chat_template: Path | None = Field(
        None,
        description="file with the chat template to use in place of the model's own, as Jinja or chat_template.json",
    )
    seed: int | None = Field(
        None,
        description="seed of those requests that send none: the same requests in the same order give the same texts; "
        "not predictable if not given",
    )
    max_queued_requests: Positive = Field(
        256, description="most sequences that may wait; more are refused (429)"
    )
    threads: Positive | None = Field(
        None,
        description="CPU threads for the model; if not given all cores that a container may use, or 1 for a base under "
        "50 M parameters",
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
            name: (*keys_of(given.get(name, ())), *keys_in(Path(str(path)), flag(f"{name}_file")))
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
                "--prefill-chunk {chunk} must not exceed --max-num-batched-tokens {step}; lower the first or "
                "raise the second",
                {"chunk": self.prefill_chunk, "step": self.max_num_batched_tokens},
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit_tiles(self) -> Self:
        if KV_TILE % self.block_size:
            raise PydanticCustomError(
                "block_size", "--block-size must divide {tile}, such as 16", {"tile": KV_TILE}
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
            if not NAME.fullmatch(name):
                raise PydanticCustomError(
                    "modules",
                    "--lora-modules: {name} is not a name; {rule}",
                    {"name": repr(name), "rule": NAME_RULE},
                )
            if name in self.base_names:
                raise PydanticCustomError(
                    "modules",
                    "--lora-modules: {name} is the base's own name; choose another, or another --served-model-name",
                    {"name": name},
                )
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


def flag(name: str) -> str:
    """How a field is spelled on the command line."""
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")


def _user_folder(variable: str, fallback: str) -> Path:
    """Our folder among the user's, as the XDG base directory specification places it."""
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / fallback) / "loraplex"
