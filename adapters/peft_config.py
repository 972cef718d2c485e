"""peft's adapter_config.json, read as a whitelist: what sets a scale, what has no effect, what is refused.

Knows nothing of tensors. Source: `LoraConfig` of peft 0.21.2.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from adapters.errors import Finding
from adapters.findings import Findings, short
from adapters.peft_keys import unwrapped
from adapters.peft_patterns import Pattern, compile_patterns, first_match, is_number, is_rank
from adapters.peft_targets import Condition, conditions

CONFIG_FILE = "adapter_config.json"
CONFIG_BYTES = 8 * 1024 * 1024  # peft writes a few kilobytes; with every module by name, a few hundred
BASE_MODEL = 256  # characters of the base's name that are kept

DEFAULT_RANK = 8  # peft's defaults, for a config that leaves them out
DEFAULT_ALPHA = 8

USED = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    }
)

# Settings that name modules, or are expressions for their names.
NAMING = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")

# No effect on what the tensors mean. The tensors' own keys say whether biases were trained; `fan_in_fan_out` is how the
# base stores its weight: A and B have the same shapes either way; `ensure_weight_tying` is about embeddings, whose
# tensors are refused by their own names.
NO_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
        *("eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config"),
        *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    }
)

REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA changes only the tokens after its invocation tokens",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA scales the singular values of the base",
    "layer_replication": "the base's layers are repeated",
    "lora_bias": "a bias is trained beside B",
    "megatron_config": "the adapter belongs to a Megatron base",
    "modules_to_save": "whole modules are replaced by trained ones",
    "monteclora_config": "MonteCLoRA draws its weights",
    "target_parameters": "parameters outside of linear modules are adapted",
    "trainable_token_indices": "embeddings of single tokens are trained",
    "use_bdlora": "the factors are block-diagonal",
    "use_dora": "DoRA rescales the base's own output",
    "use_qalora": "QA-LoRA pools the input first",
    "velora_config": "VeLoRA changes the forward",
}

# Not DoRA, which is a LORA to peft: its magnitudes would be left out.
ONLY_LORA = "only LORA is served; peft's save_as_lora approximates many other kinds by one"

# Initialisations that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga) subtract the
# initial B @ A from the base, so the saved tensors are exact on that changed base only.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
CONVERSION = (
    "save it again with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), "
    "which gives a plain LoRA"
)

UNTARGETED = (
    "send the config that was saved with these tensors (target_modules, exclude_modules, layers_to_transform)"
)

RANK, NUMBER = "a whole number above 0", "a finite number"
PATTERN_SECONDS = 5.0  # for all patterns on all names


@dataclass(frozen=True, slots=True)
class Trained:
    """With what a module was trained."""

    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What a config says about ranks and scales, and of which modules."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: tuple[Pattern, ...]
    alpha_pattern: tuple[Pattern, ...]
    targets: tuple[Condition, ...]  # all that a module's name must meet
    base_model: str

    def scale(self, trained: Trained) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return trained.alpha / (math.sqrt(trained.rank) if self.rslora else trained.rank)

    def trained(self, modules: Iterable[str], findings: Findings) -> dict[str, Trained]:
        """Rank and alpha of each module, named as in the base it was trained on."""
        deadline = time.monotonic() + PATTERN_SECONDS
        found: dict[str, Trained] = {}
        for module in modules:
            if not all(meets(module) for meets in self.targets):
                problem = "is not a module that the config targets, so that peft would leave it out"
                findings.invalid("target", Finding(module, problem, UNTARGETED))
            rank = first_match(self.rank_pattern, module, self.rank)
            found[module] = Trained(int(rank), first_match(self.alpha_pattern, module, self.alpha))
            if time.monotonic() > deadline:
                problem = f"matching the patterns takes more than {PATTERN_SECONDS:g} s"
                findings.invalid("pattern", Finding(CONFIG_FILE, problem, "write module names as keys"))
                break
        return found


def parse_config(data: bytes, findings: Findings) -> PeftConfig | None:
    """Read a config, adding what is wrong with it to the findings; None if ranks and scales are not known from it."""
    try:
        raw = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        findings.invalid("json", Finding(CONFIG_FILE, f"is not JSON: {error}"))
        return None
    if not isinstance(raw, dict):
        findings.invalid("json", Finding(CONFIG_FILE, "is not a JSON object"))
        return None
    if "fine_tune_type" in raw or "lora_parameters" in raw:
        findings.unsupported(
            "mlx", Finding(CONFIG_FILE, "is a config of mlx-lm", "convert the adapter to peft's format")
        )
        return None
    if raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type")
        what = "names no peft_type" if kind is None else f"is of peft_type {short(kind)}"
        findings.unsupported("peft_type", Finding(CONFIG_FILE, what, ONLY_LORA))
        return None
    _check_features(raw, findings)
    raw |= {key: _unwrapped(raw[key]) for key in NAMING if key in raw}
    base_model = raw.get("base_model_name_or_path")
    rank, alpha = raw.get("r", DEFAULT_RANK), raw.get("lora_alpha", DEFAULT_ALPHA)
    for key, value, valid, wanted in (("r", rank, is_rank, RANK), ("lora_alpha", alpha, is_number, NUMBER)):
        if not valid(value):
            findings.invalid(key, Finding(f"{CONFIG_FILE}: {key}", f"is {short(value)}, not {wanted}"))
    rank_pattern = compile_patterns(CONFIG_FILE, raw, "rank_pattern", is_rank, RANK, findings)
    alpha_pattern = compile_patterns(CONFIG_FILE, raw, "alpha_pattern", is_number, NUMBER, findings)
    if not is_rank(rank) or not is_number(alpha) or rank_pattern is None or alpha_pattern is None:
        return None  # what it meant to say of ranks is not known, and is held against no tensor
    return PeftConfig(
        rank=rank,
        alpha=float(alpha),
        rslora=bool(raw.get("use_rslora", False)),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        targets=conditions(raw),
        base_model=_sound(base_model)[:BASE_MODEL] if isinstance(base_model, str) else "",
    )


def _check_features(raw: Mapping[str, Any], findings: Findings) -> None:
    """Refuse every setting that would change the result and is not served. A falsy value means 'not used'."""
    for key, value in raw.items():
        if key in USED or key in NO_EFFECT or not value:
            continue
        where = f"{CONFIG_FILE}: {short(key)}"
        if key in REFUSED:
            findings.unsupported(
                key, Finding(where, f"{REFUSED[key]}, which is not served", "train without it")
            )
        else:
            problem = (
                f"is not a setting this server knows, and its value {short(value)} may change the result"
            )
            findings.unsupported(
                "unknown key", Finding(where, problem, "remove it if it has no effect at inference")
            )
    init = raw.get("init_lora_weights", True)
    if not (isinstance(init, bool) or (isinstance(init, str) and init.lower() in PLAIN_INITS)):
        problem = (
            f"{short(init)} changed the base's weights at the start of training, so this base is another one"
        )
        findings.unsupported("init", Finding(f"{CONFIG_FILE}: init_lora_weights", problem, CONVERSION))


def _unwrapped(setting: Any) -> Any:
    """A setting that names modules, as tensors' names are read: peft takes a compiled base's names as they are."""
    match setting:
        case str():
            return unwrapped(setting)
        case list():
            return [unwrapped(name) if isinstance(name, str) else name for name in setting]
        case dict():
            found: dict[str, Any] = {}
            for name, value in setting.items():
                found.setdefault(unwrapped(name), value)  # the first, as of two that match
            return found
    return setting


def _sound(text: str) -> str:
    """Text that can be written as UTF-8: JSON may hold half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
