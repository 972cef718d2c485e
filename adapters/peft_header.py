"""Names and shapes in a LoRA file against a base's layout: which factors go where, and what is wrong.

Knows nothing of values: it sees the header alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adapters.adapter import Layout
from adapters.errors import Finding
from adapters.findings import SHOWN, Findings
from adapters.peft_config import CONFIG_FILE, PeftConfig, Trained
from adapters.peft_keys import BaseModules, Key, Part, parse_key
from adapters.tensor_file import DTYPES, Header

TENSOR_FILE = "adapter_model.safetensors"
NAME_LENGTH = 512  # characters of a tensor's name

_UNSUPPORTED: dict[Part, tuple[str, str]] = {
    "magnitude": ("is a DoRA magnitude", "train without use_dora"),
    "factor bias": ("is a bias beside a LoRA factor", "train without lora_bias"),
    "embedding": ("adapts an embedding", "train without embeddings in target_modules"),
    "token": ("holds embeddings of single tokens", "train without trainable_token_indices"),
    "bias": ("is a trained bias of the base", 'train with bias="none"'),
    "module": (
        "is a whole matrix (modules_to_save, or an embedding saved with the adapter)",
        "train without modules_to_save; if it was not trained, save with save_embedding_layers=False",
    ),
    "base copy": (
        "belongs to an adapted embedding or output head",
        "train without embed_tokens and lm_head in target_modules",
    ),
    "mlx": (
        "is a factor as mlx-lm writes it, transposed and with another scale",
        "convert the adapter to peft's format",
    ),
    "image": ("belongs to an image model's LoRA (kohya or diffusers)", ""),
    "gguf": ("is named as in a GGUF file, whose rows are permuted", "send the peft adapter it was made from"),
}

UNGATHERED = "gather the shards (of DeepSpeed's ZeRO-3, or FSDP) before saving, and save the adapter again"


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one module."""

    module: str  # as in the base it was trained on
    a: Header
    b: Header


@dataclass(frozen=True, slots=True)
class Placed:
    """A pair with a place in the layout; `trained` is None where the config could not be read."""

    pair: Pair
    site: int
    member: int
    trained: Trained | None


def place(
    headers: Iterable[Header], config: PeftConfig | None, layout: Layout, max_rank: int, findings: Findings
) -> list[Placed]:
    """The sound pairs in the layout's order; whatever else there is becomes a finding."""
    names = BaseModules(layout.modules, layout.idle)
    pairs = _pair(headers, names, findings)
    found = _find(pairs, config, layout, names, findings)
    sound = [
        item
        for item in found
        if _check_shapes(item, layout, findings) and _check_rank(item, max_rank, findings)
    ]
    return sorted(sound, key=lambda item: (item.site, item.member))


def _pair(headers: Iterable[Header], names: BaseModules, findings: Findings) -> list[Pair]:
    """Factors by module; all else is refused."""
    factors: dict[str, dict[Part, Header]] = {}
    for header in headers:
        if len(header.name) > NAME_LENGTH:  # a pattern of the config takes the third power of it
            finding = Finding(f"{header.name[:80]}...", f"has a name of more than {NAME_LENGTH} characters")
            findings.invalid("long name", finding)
            continue
        key = parse_key(header.name)
        if key.part not in ("A", "B"):
            _refuse_other(header, key, names, findings)
        elif key.part in factors.setdefault(key.module, {}):
            other = factors[key.module][key.part].name
            problem = f"is the same factor as {other}"
            findings.invalid("twice", Finding(header.name, problem, "save one adapter per file"))
        else:
            factors[key.module][key.part] = header
    pairs: list[Pair] = []
    for module, found in factors.items():
        if "A" in found and "B" in found:
            pairs.append(Pair(module, found["A"], found["B"]))
            continue
        missing, present = ("B", found["A"]) if "A" in found else ("A", found["B"])
        findings.invalid(
            "half", Finding(present.name, f"has no lora_{missing} beside it", "save the adapter again")
        )
    if not factors and not findings:
        findings.invalid("empty", Finding(TENSOR_FILE, "holds no lora_A and lora_B tensors"))
    return pairs


def _refuse_other(header: Header, key: Key, names: BaseModules, findings: Findings) -> None:
    """A finding about a tensor that is no factor."""
    if key.part == "base copy" and names.find(key.module) is not None:
        problem = "is a matrix of the base as it was in training, which peft would put in the base's place"
        cure = "if it was not trained, delete it from the file"
        findings.unsupported("base matrix", Finding(header.name, problem, cure))
    elif key.part == "unknown":
        findings.invalid("unknown tensor", Finding(header.name, "is not a tensor that peft writes for LoRA"))
    else:
        problem, cure = _UNSUPPORTED[key.part]
        findings.unsupported(key.part, Finding(header.name, f"{problem}, which is not served", cure))


def _find(
    pairs: list[Pair], config: PeftConfig | None, layout: Layout, names: BaseModules, findings: Findings
) -> list[Placed]:
    """Find each pair's module in the base, and its scale; those in idle parts of the base are left out."""
    ours = (pair.module for pair in pairs if names.find(pair.module) is not None)
    trained = config.trained(ours, findings) if config else {}
    placed: dict[str, Placed] = {}
    strangers: list[Pair] = []
    for pair in pairs:
        own = names.find(pair.module)
        if own is None and names.is_idle(pair.module):
            continue
        if own is None:
            strangers.append(pair)
        elif own in placed:
            problem = f"is the module {own}, and so is {placed[own].pair.module}"
            findings.invalid("twice", Finding(pair.module, problem, "save one adapter per file"))
        else:
            site, member = layout.modules[own]
            placed[own] = Placed(pair, site, member, trained.get(pair.module))
    if strangers and not placed:
        problem = f"none of its {len(pairs)} modules is in this base, which adapts {names.shown()}"
        findings.invalid("base", Finding(strangers[0].module, problem, "use the base that it was trained on"))
    elif pairs and not placed:
        problem = "is, like all that it adapts, in a part of the base that no text passes through"
        findings.invalid("idle", Finding(pairs[0].module, problem, "adapt the text model"))
    else:
        _report_strangers(strangers, names, findings)
    return list(placed.values())


def _report_strangers(strangers: list[Pair], names: BaseModules, findings: Findings) -> None:
    for order, pair in enumerate(strangers):
        near = names.near(pair.module) if order < SHOWN else None
        cure = f"this base has {near}" if near else f"this base adapts {names.shown()}"
        findings.invalid("module", Finding(pair.module, "is not a module that this base adapts", cure))


def _check_shapes(item: Placed, layout: Layout, findings: Findings) -> bool:
    """Shapes and dtypes of one module's factors."""
    pair, site = item.pair, layout.sites[item.site]
    inside, outside = site.in_features, site.members[item.member].out_features
    odd = [header for header in (pair.a, pair.b) if header.dtype not in DTYPES]
    for header in odd:
        problem = f"is of dtype {header.dtype}"
        findings.invalid("dtype", Finding(header.name, problem, "save it as float32, float16 or bfloat16"))
    a, b = pair.a.shape, pair.b.shape
    flat = len(a) == 2 and len(b) == 2
    if flat and a[0] == b[1] and (a[1], b[0]) == (inside, outside):
        return not odd
    problem = f"lora_A is {list(a)} and lora_B {list(b)}, this base needs [r, {inside}] and [{outside}, r]"
    cure = "use the base that it was trained on"
    if flat and a[1] == b[0] and (a[0], b[1]) == (inside, outside):
        problem, cure = f"its factors are transposed: {problem}", "transpose both, as peft stores them"
    elif any(len(header.shape) < 2 or 0 in header.shape for header in (pair.a, pair.b)):
        cure = UNGATHERED
    findings.invalid("shape", Finding(pair.module, problem, cure))
    return False


def _check_rank(item: Placed, max_rank: int, findings: Findings) -> bool:
    """The rank of sound shapes: above zero, within the cap, and what the config says."""
    rank, module = item.pair.a.shape[0], item.pair.module
    if rank < 1:
        findings.invalid("no rank", Finding(module, "has rank 0", UNGATHERED))
        return False
    if item.trained and item.trained.rank != rank:
        problem = f"has rank {rank}, and {CONFIG_FILE} says {item.trained.rank}"
        findings.invalid(
            "rank", Finding(module, problem, "send the config that was saved with these tensors")
        )
    if rank > max_rank:
        problem = f"has rank {rank}, this server takes up to {max_rank}"
        findings.invalid("rank cap", Finding(module, problem, "train a lower rank, or raise --max-lora-rank"))
    return rank <= max_rank
