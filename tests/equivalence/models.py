"""Tiny models of the served architectures, held in each way that we hold a base, and random adapters for them."""

import copy
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 512
_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(head_dim=64, **_SIZES),
    "mistral": lambda: MistralConfig(sliding_window=32, **_SIZES),
    "gemma2": lambda: Gemma2Config(head_dim=64, sliding_window=32, final_logit_softcapping=30.0, **_SIZES),
    "phi3": lambda: Phi3Config(**_SIZES),
}
_IMAGES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_TEXT = {"head_dim": 64, "sliding_window": 32, **_SIZES}
# With a tower for images beside the text model, whose linears have the names of the adapters' targets.
MULTIMODAL = {
    "gemma3": lambda: Gemma3Config(text_config=_TEXT, vision_config=_IMAGES, mm_tokens_per_image=4),
}
_SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def adapter_configs(architecture: str) -> dict[str, LoraConfig]:
    """Four adapters of ranks 3, 8, 16 and 64, with every way of scaling that we serve."""
    targets = _FUSED if architecture == "phi3" else _SPLIT
    attention = targets[:2] if architecture == "phi3" else ["q_proj", "v_proj"]
    given = {"lora_dropout": 0.0, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return {
        "rank3": LoraConfig(r=3, lora_alpha=24, target_modules=attention, **given),
        "rank8": LoraConfig(r=8, lora_alpha=16, target_modules=targets, use_rslora=True, **given),
        "rank16": LoraConfig(
            r=16, lora_alpha=16, target_modules=targets, alpha_pattern={targets[0]: 40}, **given
        ),
        "rank64": LoraConfig(
            r=64, lora_alpha=64, target_modules=targets, rank_pattern={"down_proj": 20}, **given
        ),
    }


def plain_model(architecture: str) -> nn.Module:
    """Random weights in float32."""
    torch.manual_seed(0)
    config = (CONFIGS | MULTIMODAL)[architecture]()
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()


def held_model(folder: Path, how: str, device: str = "cpu") -> nn.Module:
    """The checkpoint in `folder`, held as `how` says: "fp32", "bf16", "nf4", "nf4-bf16" or "int8"."""
    quantization = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    }.get(how.removesuffix("-bf16"))
    given = {} if quantization is None else {"quantization_config": quantization}
    dtype = torch.bfloat16 if how.endswith("bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", device_map={"": device}, **given
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
    return model.eval()


def exact_twin(model: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` in float64 with the very values that `model` holds, quantized weights dequantized."""
    twin = copy.deepcopy(plain)
    held = dict(model.named_modules())
    for path, module in twin.named_modules():
        other = held.get(path)
        if isinstance(other, Linear4bit):
            module.weight.data = (
                bnb.dequantize_4bit(other.weight.data, other.weight.quant_state).float().cpu()
            )
        elif isinstance(other, Linear8bitLt):
            module.weight.data = other.weight.data.float() * (other.weight.SCB.float() / 127.0)[:, None]
            module.weight.data = module.weight.data.cpu()
        elif isinstance(module, nn.Linear):
            module.weight.data = other.weight.data.float().cpu()
    for name, parameter in model.named_parameters():
        if not name.endswith("proj.weight") and name != "lm_head.weight":
            twin.get_parameter(name).data = parameter.data.float().cpu()
    return twin.double()


def with_adapters(model: nn.Module, architecture: str) -> nn.Module:
    """A peft model with the four adapters, their factors random and the same for every `model`."""
    configs = adapter_configs(architecture)
    first, *others = configs
    peft_model = get_peft_model(model, configs[first], adapter_name=first)
    for name in others:
        peft_model.add_adapter(name, configs[name])
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(peft_model.named_parameters()):
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.03
            parameter.data = values.to(peft_model.device, parameter.dtype)
    return peft_model.eval()
