"""A base of the size people serve, with random weights, and adapters for it: made once, kept in the user's cache.

Speed does not depend on what weights say, so that no hub is needed. Knows nothing of who is timed with them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ADAPTERS = 32
RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    layers: int = 16
    hidden: int = 2048
    intermediate: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32_000

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each target."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_weights(self) -> int:
        """Weights that are quantized."""
        return self.layers * sum(width_in * width_out for width_in, width_out in self.widths.values())

    @property
    def head_weights(self) -> int:
        """Weights of lm_head, which are not."""
        return self.hidden * self.vocabulary

    @property
    def adapter_weights(self) -> int:
        """Weights of one adapter on every linear."""
        return self.layers * RANK * sum(map(sum, self.widths.values()))


@dataclass(frozen=True)
class Checkpoint:
    """Where the base and its adapters lie."""

    shape: Shape
    base: Path
    adapters: tuple[Path, ...]


def checkpoint(shape: Shape, root: Path) -> Checkpoint:
    """The base and its adapters under `root`, made if they are not there."""
    folder = root / "-".join(
        str(size)
        for size in (shape.layers, shape.hidden, shape.intermediate, shape.kv_heads, shape.vocabulary)
    )
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
        try:
            _make_base(shape, making / "base")
            for number in tqdm(range(ADAPTERS), desc="making adapters"):
                make_adapter(shape, making / f"adapter-{number}", number)
            os.replace(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    adapters = tuple(folder / f"adapter-{number}" for number in range(ADAPTERS))
    return Checkpoint(shape, folder / "base", adapters)


def llama_config(shape: Shape, **others: Any) -> LlamaConfig:
    """Llama's configuration in that shape."""
    return LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        bos_token_id=0,
        **others,
    )


def _make_base(shape: Shape, folder: Path) -> None:
    config = llama_config(shape, max_position_embeddings=4096, eos_token_id=1, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    for name, parameter in tqdm(list(model.named_parameters()), desc="drawing weights"):
        if name.endswith("norm.weight"):
            parameter.data.fill_(1.0)
        else:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    model.save_pretrained(folder)
    make_tokenizer(shape, folder)


def make_tokenizer(shape: Shape, folder: Path) -> None:
    """A word for each id."""
    words = {f"t{number}": number for number in range(shape.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="t0", eos_token="t1").save_pretrained(folder)


def make_adapter(shape: Shape, folder: Path, seed: int, rank: int = RANK) -> None:
    """Random factors on every linear, in bfloat16, as peft saves them."""
    draw = torch.Generator().manual_seed(seed + 1)
    tensors = {}
    for layer in range(shape.layers):
        for target, (width_in, width_out) in shape.widths.items():
            part = "self_attn" if target in TARGETS[:4] else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{part}.{target}"
            a, b = torch.randn(rank, width_in, generator=draw), torch.randn(width_out, rank, generator=draw)
            tensors[f"{prefix}.lora_A.weight"] = (a * 0.02).bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = (b * 0.02).bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(TARGETS),
        "base_model_name_or_path": "random-llama",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
