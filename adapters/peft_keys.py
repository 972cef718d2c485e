"""Names of tensors in a LoRA file, as peft and its relatives write them: which module, and which part of it.

Knows nothing of shapes or values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal[
    "A",  # lora_A: [rank, in]
    "B",  # lora_B: [out, rank]
    "base copy",  # base_layer.weight: the base's own matrix; peft saves it beside an adapted embedding or head
    "magnitude",  # DoRA
    "factor bias",  # lora_bias
    "embedding",  # lora_embedding_A, lora_embedding_B
    "token",  # trainable_token_indices
    "bias",  # bias="all" or "lora_only"
    "module",  # modules_to_save, or an embedding saved after a resize
    "mlx",  # lora_a, lora_b: transposed, with a direct scale
    "image",  # kohya and diffusers
    "gguf",  # llama.cpp, with permuted q and k
    "unknown",
]

# Wrappers that training adds around a model, and that a name may begin with or pass through. An expression that names
# one may escape its dot, or repeat it as any character: ".*" goes on to stand for what follows.
_WRAPPER = re.compile(
    r"(?<!\w)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\\?\.(?![*+?{])|(?=\.[*+?{]))"
)
_PREFIX = re.compile(r"^(?:(?:base_model\.model|base_model|module)\.)+")
# Where the text model sits: bare, in a causal model, or in a multimodal one.
# At most four: a long name that is made of them is no module's, and is matched with no pattern of the config.
_HOME = re.compile(r"^(?:(?:model|language_model)\.){1,4}")

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
_OTHER: tuple[tuple[re.Pattern[str], Part], ...] = (
    (
        re.compile(
            r"^(?P<module>lora_(?:unet|te\d?)_.+|.+\.(?:lora_down|lora_up|lora\.down|lora\.up)\.weight)$"
        ),
        "image",
    ),
    (re.compile(r"^(?P<module>blk\.\d+\..+)\.weight\.lora_[ab]$"), "gguf"),
    (re.compile(r"^(?P<module>.+)\.lora_[ab](?:\.weight)?$"), "mlx"),
    (re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(?:\..+)?$"), "magnitude"),
    (re.compile(r"^(?P<module>.+)\.lora_[AB](?:\.[^.]+)?\.bias$"), "factor bias"),
    (re.compile(r"^(?P<module>.+)\.lora_embedding_[AB](?:\..+)?$"), "embedding"),
    (
        re.compile(
            r"^(?P<module>.+)\.(?:token_adapter\.)?trainable_tokens_(?:delta|indices|original)(?:\..+)?$"
        ),
        "token",
    ),
    (re.compile(r"^(?P<module>.+)\.base_layer\.weight$"), "base copy"),
    (re.compile(r"^(?P<module>.+)\.bias$"), "bias"),
    (re.compile(r"^(?P<module>.+)\.weight$"), "module"),
)


@dataclass(frozen=True, slots=True)
class Key:
    """What a tensor's name says."""

    module: str  # as in the base it was trained on: prefixes of peft and of wrappers are gone
    part: Part
    adapter: str = ""  # "default" in a raw state dict; peft leaves it out


def unwrapped(text: str) -> str:
    """A name, or an expression for names, without the wrappers that training puts around modules."""
    return _WRAPPER.sub("", text)


def parse_key(name: str) -> Key:
    """Read one tensor's name."""
    plain = _PREFIX.sub("", unwrapped(name))
    if match := _FACTOR.match(plain):
        part: Part = "A" if match["part"] == "A" else "B"
        return Key(match["module"], part, match["adapter"] or "")
    for pattern, part in _OTHER:
        if match := pattern.match(plain):
            return Key(match["module"], part)
    return Key(plain, "unknown")


class BaseModules:
    """A base's adaptable modules, found by the names that other bases of the same text model give them."""

    def __init__(self, modules: Iterable[str], idle: Iterable[str] = ()) -> None:
        self._modules = tuple(modules)
        self._idle = tuple(f"{_HOME.sub('', part)}." for part in idle)
        self._exact = frozenset(self._modules)
        self._bare: dict[str, str | None] = {}
        for module in self._modules:
            bare = _HOME.sub("", module)
            self._bare[bare] = None if bare in self._bare else module  # two homes: neither is meant

    def find(self, module: str) -> str | None:
        """The base's own name of a module, or None."""
        return module if module in self._exact else self._bare.get(_HOME.sub("", module))

    def is_idle(self, module: str) -> bool:
        """Whether it is in a part of the base that no text passes through."""
        return f"{_HOME.sub('', module)}.".startswith(self._idle)

    def near(self, module: str) -> str | None:
        """A module of the base that may have been meant: a sibling of nearly the same name."""
        parent, _, leaf = _HOME.sub("", module).rpartition(".")
        leaves: Mapping[str, str] = {
            bare.rpartition(".")[2]: bare for bare in self._bare if bare.rpartition(".")[0] == parent
        }
        close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
        return (self._bare[leaves[close[0]]] or leaves[close[0]]) if close else None

    def shown(self) -> str:
        """What this base calls its modules, for a message: one example of each short name."""
        examples: dict[str, str] = {}
        for module in self._modules:
            examples.setdefault(module.rpartition(".")[2], module)
        return ", ".join(list(examples.values())[:8]) or "none"
