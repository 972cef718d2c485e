"""From a path to a transformers model, in the dtype and the quantization asked for.

Weights are quantized once, saved before any forward pass (bitsandbytes' CPU path repacks them in place, and saving
afterwards writes a broken checkpoint), and read back from that copy ever after. Knows nothing of what is served.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from server.config import SettingsError
from server.errors import UnsupportedModelError
from server.model.quantized_cache import cache_key, cached

logger = logging.getLogger(__name__)

Quantization = Literal["nf4", "int8", "none"]

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model")  # of a hub's repository
_NOT_FILES = ("consolidated*", "*/*")  # the same weights again, under other names
_ELSEWHERE = (ImportError, torch.OutOfMemoryError, torch.AcceleratorError)  # no fault of a copy


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which checkpoint, and how it is to be held."""

    model: str  # a folder, or a name on the Hugging Face hub
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization
    cache: Path | None  # where quantized copies live; None keeps none
    trust_remote_code: bool = False
    max_model_len: int | None = None  # tokens of the longest text that is asked for


def load_model(source: ModelSource) -> PreTrainedModel:
    """Load the checkpoint; raises `UnsupportedModelError` when there is no causal model or no way to quantize it.

    What its configuration shows to be wrong is said before weights are read.
    """
    folder = _folder(source)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{source.model} cannot be served: its configuration cannot be read: {error}"
        ) from error
    _refuse_longer_texts(config, source)
    generation = _generation_config(folder, source)
    model = _as_asked(folder, config, source)
    if generation is not None:  # a quantized copy has that of the day it was made
        model.generation_config = generation
    return model


def _as_asked(folder: Path, config: PreTrainedConfig, source: ModelSource) -> PreTrainedModel:
    """The weights as they are, quantized on their way, or from the quantized copy."""
    if getattr(config, "quantization_config", None) is not None or source.quantization == "none":
        return _read(folder, config, source, None)
    quantization = _quantization_config(source.quantization)
    if source.cache is None:
        return _quantized(folder, config, source, quantization)
    return _from_copy(folder, config, source, source.cache, quantization)


def _quantized(
    folder: Path, config: PreTrainedConfig, source: ModelSource, quantization: BitsAndBytesConfig
) -> PreTrainedModel:
    _refuse_experts(folder, config, source)
    return _read(folder, config, source, quantization)


def _from_copy(
    folder: Path,
    config: PreTrainedConfig,
    source: ModelSource,
    cache: Path,
    quantization: BitsAndBytesConfig,
) -> PreTrainedModel:
    """The quantized copy, made if there is none; one that cannot be read is made once more."""
    settings = {
        "quantization": str(quantization.to_dict()),
        "dtype": str(source.dtype),  # of what is not quantized: saved as it was loaded
        "bitsandbytes": bitsandbytes.__version__,
    }

    def quantize(into: Path) -> None:
        logger.info("quantizing model=%s to=%s", source.model, source.quantization)
        model = _quantized(folder, config, source, quantization)
        model.save_pretrained(into)
        del model
        gc.collect()

    key = cache_key(folder, settings)
    try:
        copy = cached(cache, key, quantize)
        try:
            return _read(copy, config, source, None)
        except UnsupportedModelError as error:
            if isinstance(error.__cause__, _ELSEWHERE):
                raise
            logger.warning("the quantized copy cannot be read, so it is made again: %s", error)
            shutil.rmtree(copy)
            return _read(cached(cache, key, quantize), config, source, None)
    except OSError as error:
        raise SettingsError(
            f"--quantized-cache {cache}: cannot be used: {error.strerror or error}; name another folder"
        ) from error


def _folder(source: ModelSource) -> Path:
    """The checkpoint's folder, fetched from the hub if need be."""
    if Path(source.model).is_dir():
        return Path(source.model)
    files = [*_FILES, *(["*.py"] if source.trust_remote_code else [])]
    try:
        folder = Path(snapshot_download(source.model, allow_patterns=files, ignore_patterns=[*_NOT_FILES]))
    except Exception as error:
        raise UnsupportedModelError(
            f"{source.model} cannot be served: it is not a folder here, and it cannot be fetched from the hub: {error}"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise UnsupportedModelError(
            f"{source.model} cannot be served: it has no weights as .safetensors, and others are not fetched, since "
            "reading them may run code; name a folder in which they were saved by save_pretrained()"
        )
    return folder


def _read(
    folder: Path, config: PreTrainedConfig, source: ModelSource, quantization: BitsAndBytesConfig | None
) -> PreTrainedModel:
    given: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    with _refused_where_it_fails(folder, source):
        model, found = _class_for(config, source).from_pretrained(
            folder,
            dtype=source.dtype,
            device_map={"": source.device},
            attn_implementation="eager",
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            **given,
        )
    _refuse_incomplete(model, source, found)
    for name, parameter in model.named_parameters():
        # a quantized checkpoint is left in the dtype it was saved with
        if parameter.is_floating_point() and not _stays_in_float32(name, model):
            parameter.data = parameter.data.to(source.dtype)
    return cast(PreTrainedModel, model)


def _stays_in_float32(name: str, model: PreTrainedModel) -> bool:
    """Whether the model's authors want it so, whatever the others are in: routers, sinks."""
    return any(f".{part}." in f".{name}." for part in model._keep_in_fp32_modules_strict)


def auto_class(config: PreTrainedConfig) -> Any | None:  # of transformers, which has no types
    """Which class of transformers reads a model for its text: the one for images too, where it is no causal model."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else None


def _class_for(config: PreTrainedConfig, source: ModelSource) -> Any:
    of_its_own = source.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    found = AutoModelForCausalLM if of_its_own else auto_class(config)
    if found is None:
        raise UnsupportedModelError(
            f"{source.model} cannot be served: transformers has no causal language model of type {config.model_type}"
        )
    return found


@contextmanager
def _refused_where_it_fails(folder: Path, source: ModelSource) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UnsupportedModelError(f"{source.model} cannot be served: {error} (in {folder})") from error


def _generation_config(folder: Path, source: ModelSource) -> GenerationConfig | None:
    """What the model's authors say of sampling and ends, if they do; transformers makes do without a broken one."""
    if not (folder / "generation_config.json").exists():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"{source.model} cannot be served: its generation_config.json cannot be read: {error}"
        ) from error


def _refuse_incomplete(
    model: PreTrainedModel, source: ModelSource, found: Mapping[str, Sequence[Any]]
) -> None:
    """transformers fills what a checkpoint lacks with random numbers."""
    lacking = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    lacking += [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
        and getattr(module.weight, "quant_state", None) is not None
        and tuple(module.weight.quant_state.shape) != (module.out_features, module.in_features)
    ]
    if lacking:
        raise UnsupportedModelError(
            f"{source.model} cannot be served: its files lack {len(lacking)} weights of {type(model).__name__}, or "
            f"hold them in another shape, {lacking[0]} among them; fetch it again, with its config.json"
        )
    if strangers := sorted(found["unexpected_keys"]):
        logger.warning(
            "the checkpoint has %d weights that the model does not use, %s among them",
            len(strangers),
            strangers[0],
        )


def kind_of_weights(model: PreTrainedModel) -> str:
    """What most of the model's linears hold, as `--quantization` calls it where it does."""
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, Linear4bit) and hasattr(
            module.weight, "quant_type"
        ):  # a tower's may have lost its own
            return str(module.weight.quant_type)
    return "int8" if any(isinstance(module, Linear8bitLt) for module in modules) else str(model.dtype)[6:]


def _quantization_config(quantization: Quantization) -> BitsAndBytesConfig:
    # threshold 0: an outlier in one row must not change how another's columns are computed
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _refuse_longer_texts(config: PreTrainedConfig, source: ModelSource) -> None:
    made_for = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if made_for is not None and 0 < made_for < (source.max_model_len or 0):
        raise SettingsError(
            f"--max-model-len {source.max_model_len}: the model was made for {made_for} tokens; "
            "give that or fewer, or leave the flag out"
        )


def _refuse_experts(folder: Path, config: PreTrainedConfig, source: ModelSource) -> None:
    """Mixture-of-experts weights are 3-D parameters, which bitsandbytes leaves as they are: not a 4-bit model."""
    with _refused_where_it_fails(folder, source), torch.device("meta"):  # the model without its weights
        model = _class_for(config, source).from_config(
            config, attn_implementation="eager", trust_remote_code=source.trust_remote_code
        )
    if left := experts_of(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be served quantized: bitsandbytes leaves its experts unquantized "
            f"({left[0]} and {len(left) - 1} more); serve it with --quantization none"
        )


def experts_of(model: PreTrainedModel) -> list[str]:
    """The names of mixture-of-experts weights: all experts' in one parameter, which is no linear's.

    Those of the text model: a tower for images may have a table of positions of as many dimensions.
    """
    text = {id(parameter) for parameter in model.get_decoder().parameters()}
    return [
        name for name, parameter in model.named_parameters() if parameter.ndim == 3 and id(parameter) in text
    ]
