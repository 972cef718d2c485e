"""Every language model of transformers, tiny and random: a mixed batch of it agrees with peft, or it is refused.

    python -m tests.equivalence.architectures        # all, some minutes; writes the lists of docs/models.md
    python -m tests.equivalence.architectures glm4   # these alone, nothing is written

Exits 1 if one is answered wrongly or fails in any other way than by a refusal.
"""

import copy
import os
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from kernels.cpu.library import load
from server.errors import UnsupportedModelError
from server.model import kernel_set
from server.model.load import auto_class, experts_of
from server.model.servable import make_servable
from tests.equivalence.case import EXACT
from tests.equivalence.harness import Harness, Row, read_peft
from tests.equivalence.oracle import peft_logits, relative_error
from tests.generate_docs import DOCS, renewed

Status = Literal["served", "without quantization", "refused", "not tried", "wrong"]

CLASSES: dict[str, str] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
VOCAB = 160
MOST_WEIGHTS = 60_000_000  # of a model that is still tiny: some have parts that no size here changes
LAYERS = 4
# What configurations call their sizes, and more; each gets those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"], 96),
    **dict.fromkeys(
        ["moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"], 48
    ),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers"], LAYERS
    ),
    **dict.fromkeys(["num_attention_heads", "n_head", "decoder_attention_heads", "num_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "qk_nope_head_dim", "kv_lora_rank"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["q_lora_rank", "qk_head_dim"], 24),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 256),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"], 2),
    **dict.fromkeys(["first_k_dense_replace", "moe_layer_start_index", "n_group", "topk_group"], 1),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCAB),
    "v_head_dim": 12,
    "sliding_window": 32,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "is_decoder": True,  # BERT and its kin see what comes after, else
}
ONLY_IF_GIVEN = ("sliding_window", "q_lora_rank", "num_kv_shared_layers")  # None or 0 means without
SECTIONS = dict.fromkeys(
    ["qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"], (2, 3, 3)
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OF_ONE: dict[str, dict[str, Any]] = {  # what one architecture asks for besides
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(["full_attention", "sliding_attention"], ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    **{kind: {"layer_types": ["conv", "full_attention"] * 2} for kind in ("lfm2", "lfm2_moe")},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}

# For peft these are experts as a whole, wherever they are.
NAMES_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class Outcome:
    status: Status
    why: str = ""


def tiny_config(kind: str) -> PreTrainedConfig:
    """The architecture's own defaults, but for sizes."""
    of = CONFIG_MAPPING[kind]
    return of(**_sizes(of()))


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """Small sizes for what it has, its parts' too; of each kind of layer that it has there is one."""
    default = config.to_dict()
    given = {name: size for name, size in SIZES.items() if name in default}
    given = {name: size for name, size in given.items() if name not in ONLY_IF_GIVEN or default[name]}
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(default.get(name), list):
            kinds = list(dict.fromkeys(default[name]))
            given[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    if "kv_lora_rank" in default:  # what turns has a width of its own, and all heads have keys
        given["num_key_value_heads"] = SIZES["num_attention_heads"]
        if "head_dim" in default:
            given["head_dim"] = SIZES["qk_rope_head_dim"]
    if config.model_type in SECTIONS:
        given["rope_parameters"] = ROPE | {"mrope_section": SECTIONS[config.model_type]}
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            given[name] = _sizes(part)
    return given | OF_ONE.get(config.model_type, {})


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Random weights in float32, biases and norms random too."""
    torch.manual_seed(0)
    model = _untouched(config).eval().float()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.06)
    return model


def _untouched(config: PreTrainedConfig) -> PreTrainedModel:
    return auto_class(config).from_config(config, attn_implementation="eager")


def outcome(kind: str) -> Outcome:
    """What becomes of one architecture."""
    try:
        config = tiny_config(kind)
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in _untouched(config).parameters())
        if weights > MOST_WEIGHTS:
            return Outcome("not tried", f"it would have {weights / 1e6:.0f} million weights")
        model = tiny_model(config)
        exact = copy.deepcopy(model).double()
        exact.set_experts_implementation("eager")  # the others have no float64
        with torch.inference_mode():
            ids = torch.arange(3, 70)[None]
            want, got = (each(input_ids=ids, use_cache=False).logits for each in (exact, model))
    except Exception as error:  # of transformers, or of the configuration made here
        return Outcome("not tried", f"{type(error).__name__} {error}".replace("\n", " "))
    quantized = not experts_of(model)
    try:
        error, own = _worst_error(model, exact), relative_error(got, want)
    except UnsupportedModelError as refused:
        return Outcome("refused", str(refused).partition(" cannot be served: ")[2])
    if error > max(EXACT, 10 * own):
        return Outcome("wrong", f"relative error {error:.1e}, transformers' own in float32 is {own:.1e}")
    return Outcome("served" if quantized else "without quantization")


def _worst_error(model: PreTrainedModel, exact: PreTrainedModel) -> float:
    """The largest relative error of a mixed batch against peft in float64."""
    experts = experts_of(model)
    library = load()
    servable = make_servable(model, kernels=kernel_set.compiled(library) if library else kernel_set.plain())
    modules = [member.module for site in servable.layout.sites for member in site.members]
    targets = [m for m in modules if m.rpartition(".")[2] not in NAMES_OF_EXPERTS] if experts else modules
    oracle = _adapted(exact.float(), targets)
    with tempfile.TemporaryDirectory() as folder:
        adapters = read_peft(oracle, Path(folder), servable)
    oracle.double()
    rows = _rows()
    ours = Harness(servable, adapters).run(rows, {"second": 2, "short": 4})
    found = []
    for name, row in rows.items():
        want = peft_logits(oracle, row.tokens, row.adapter)
        found += [relative_error(logits, want[at]) for at, logits in ours[name].items()]
    return max(found)


def _adapted(exact: PreTrainedModel, targets: list[str]) -> PeftModel:
    """With two adapters of random factors: one on all targets, one on the first half of them."""
    given: dict[str, Any] = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        exact, LoraConfig(r=4, lora_alpha=16, target_modules=targets, **given), adapter_name="every"
    )
    model.add_adapter(
        "first half", LoraConfig(r=20, target_modules=targets[: -(-len(targets) // 2)], **given)
    )
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.eval()


def _rows() -> dict[str, Row]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"base": (70, 60, None), "first": (50, 33, "every"), "other": (45, 40, "first half"),
              "second": (20, 9, "every"), "short": (12, 1, None)}  # fmt: skip
    return {
        name: Row(torch.randint(3, VOCAB, (length,), generator=generator).tolist(), prompt, adapter)
        for name, (length, prompt, adapter) in shapes.items()
    }


def lists(found: dict[str, Outcome]) -> str:
    """Class names, as a checkpoint's config.json has them, by what becomes of them."""
    served: dict[Status, set[str]] = defaultdict(set)
    refused: dict[str, set[str]] = defaultdict(set)
    for kind, each in found.items():
        name = CLASSES[kind] if isinstance(CLASSES[kind], str) else CLASSES[kind][0]
        if each.status == "refused":
            refused[_reason(each.why)].add(name)
        else:
            served[each.status].add(name)
    text = f"From transformers {transformers.__version__}.\n"
    for status, title in {
        "served": "Served in NF4, int8 or as they are",
        "without quantization": "Served with `--quantization none`: their experts are no linears, and stay as they are",
        "not tried": "Not tried: no tiny model of it was made",
    }.items():
        text += f"\n**{title}**: {_named(served[status])}.\n"
    reasons = "".join(f"| {why} | {_named(names)} |\n" for why, names in sorted(refused.items()))
    return f"{text}\n**Refused**, with this reason:\n\n| reason | |\n| --- | --- |\n{reasons}"


def _reason(why: str) -> str:
    """What it is, without numbers that are the tiny model's and without the words of an exception."""
    if "attention interface" in why:
        return why.partition("; ")[2]
    return why.partition(": ")[0].partition("; ")[0]


def _named(classes: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(classes))


def main(kinds: list[str]) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    found = {}
    for kind in tqdm(kinds or sorted(CLASSES), "architectures"):
        found[kind] = outcome(kind)
        if kinds or found[kind].status in ("wrong", "not tried"):
            tqdm.write(f"{kind}: {found[kind].status} {found[kind].why}")
    if not kinds:
        page = DOCS / "models.md"
        page.write_text(renewed(page.read_text(encoding="utf-8"), lists(found)), encoding="utf-8")
    return int(any(each.status == "wrong" for each in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
