"""From a path to a transformers model, in the dtype and the quantization asked for.

Weights are quantized once, saved before any forward pass (bitsandbytes' CPU path repacks them in place, and saving
afterwards writes a broken checkpoint), and read back from that copy ever after. Knows nothing of what is served.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import bitsandbytes
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from server.errors import UnsupportedModelError
from server.model.quantized_cache import cache_key, cached

logger = logging.getLogger(__name__)

Quantization = Literal["nf4", "int8", "none"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which checkpoint, and how it is to be held."""

    model: str  # a folder, or a name on the Hugging Face hub
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization
    cache: Path | None  # where quantized copies live; None keeps none
    trust_remote_code: bool = False


def load_model(source: ModelSource) -> PreTrainedModel:
    """Load the checkpoint; raises `UnsupportedModelError` when there is no causal model or no way to quantize it."""
    folder = _folder(source.model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{source.model} cannot be served: its configuration cannot be read: {error}"
        ) from error
    if getattr(config, "quantization_config", None) is not None or source.quantization == "none":
        return _read(folder, source, None)
    quantization = _quantization_config(source.quantization)
    if source.cache is None:
        return _refuse_unquantized_experts(_read(folder, source, quantization))
    settings = {
        "quantization": str(quantization.to_dict()),
        "dtype": str(source.dtype),  # of what is not quantized: saved as it was loaded
        "bitsandbytes": bitsandbytes.__version__,
    }

    def quantize(into: Path) -> None:
        logger.info("quantizing model=%s to=%s", source.model, source.quantization)
        model = _refuse_unquantized_experts(_read(folder, source, quantization))
        model.save_pretrained(into)
        del model
        gc.collect()

    return _read(cached(source.cache, cache_key(folder, settings), quantize), source, None)


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(
            snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
        )
    except Exception as error:
        raise UnsupportedModelError(
            f"{model} cannot be served: it is not a folder here, and it cannot be fetched from the hub: {error}"
        ) from error


def _read(folder: Path, source: ModelSource, quantization: BitsAndBytesConfig | None) -> PreTrainedModel:
    given: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=source.dtype,
            device_map={"": source.device},
            attn_implementation="eager",
            trust_remote_code=source.trust_remote_code,
            **given,
        )
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{source.model} cannot be served: {error}") from error
    for (
        parameter
    ) in model.parameters():  # transformers leaves a quantized checkpoint in the dtype it was saved with
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(source.dtype)
    return cast(PreTrainedModel, model)


def _quantization_config(quantization: Quantization) -> BitsAndBytesConfig:
    if (
        quantization == "int8"
    ):  # threshold 0: an outlier in one row must not change how another's columns are computed
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _refuse_unquantized_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Mixture-of-experts weights are 3-D parameters, which bitsandbytes leaves as they are: not a 4-bit model."""
    left = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    if left:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be served quantized: bitsandbytes leaves its experts unquantized "
            f"({left[0]} and {len(left) - 1} more); serve it with --quantization none"
        )
    return model
