"""Trains the base and the adapters, given their documents, and writes what they ship as.

The adapters are trained on the quantized base (NF4, double quantization), so they are exact on it. It
knows nothing of the text, nor of how well the result does.
"""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from demo.tokenizer import MAX_LENGTH, VOCABULARY_SIZE

NAME = "loraplex-demo"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

Batch = tuple[Tensor, Tensor]  # ids and labels, both [rows, length]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one model is trained."""

    steps: int
    tokens: int  # per batch, padding included
    rate: float
    warmup: float = 0.05
    decay: float = 0.0


def new_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained base: 5.2 M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load_quantized(base: Path) -> LlamaForCausalLM:
    """The shipped weights as the server holds them: NF4 with double quantization, computing in float32.

    Never save this model: on some machines bitsandbytes repacks its weights in the first forward.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    return model


def fit(model: nn.Module, batches: Iterable[Batch], recipe: Recipe, label: str) -> None:
    """AdamW over the batches with a warm-up and a cosine decay of the rate."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in weights if weight.ndim > 1]
    vectors = [weight for weight in weights if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, recipe))
    model.train()
    bar = tqdm(batches, total=recipe.steps, desc=label, mininterval=1.0)
    smooth = math.nan
    for ids, labels in bar:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
    model.eval()


def rate_factor(step: int, recipe: Recipe) -> float:
    """The part of the full rate in use at a step."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, recipe.steps - warm)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the base in bfloat16, its tokenizer and its generation defaults."""
    model.config.name_or_path = NAME
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def new_adapter(base: LlamaForCausalLM, rank: int, targets: tuple[str, ...]) -> PeftModel:
    """The quantized base under a fresh LoRA of this rank on these modules."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes the LoRA in peft's format, without the model card and without a machine's path."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = NAME
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    edit_json(folder / "adapter_config.json", {"target_modules": sorted(config.target_modules)})


def edit_json(path: Path, changes: dict[str, object]) -> None:
    """Overwrites some keys of a JSON file, and sorts it, so that two runs write the same bytes."""
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
