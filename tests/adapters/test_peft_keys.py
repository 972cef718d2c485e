"""Names of tensors, as peft and its relatives write them."""

from __future__ import annotations

import pytest

from adapters.peft_keys import BaseModules, Key, parse_key, unwrapped

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{Q}.lora_A.weight",
        f"{Q}.lora_A.weight",
        f"module.base_model.model.{Q}.lora_A.weight",
        f"_orig_mod.base_model.model.{Q}.lora_A.weight",
        f"base_model.model._orig_mod.{Q}.lora_A.weight",
        f"_fsdp_wrapped_module.base_model.model.{Q}.lora_A.weight",
        "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
        f"base_model.model._checkpoint_wrapped_module.{Q}.lora_A.weight",
        f"base_model._orig_mod.model.{Q}.lora_A.weight",
        "base_model.model.model.layers.0._orig_mod._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
    ],
)
def test_prefixes_and_wrappers_are_gone(name):
    assert parse_key(name) == Key(Q, "A")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (f"_orig_mod.{Q}", Q),
        (r"_orig_mod\.model\.layers\.\d+\..*", r"model\.layers\.\d+\..*"),
        (r"_orig_mod.*layers\.0\..*", r".*layers\.0\..*"),
        ("_orig_mod.+q_proj", ".+q_proj"),
        ("model._orig_mod.layers.0", "model.layers.0"),
        ("my_orig_mod.layers.0", "my_orig_mod.layers.0"),
        (Q, Q),
    ],
)
def test_settings_lose_wrappers_as_tensors_do(text, plain):
    assert unwrapped(text) == plain


def test_raw_state_dicts_name_the_adapter():
    assert parse_key(f"base_model.model.{Q}.lora_B.default.weight") == Key(Q, "B", "default")


@pytest.mark.parametrize(
    ("tail", "part"),
    [
        ("lora_magnitude_vector", "magnitude"),
        ("lora_magnitude_vector.default.weight", "magnitude"),
        ("lora_B.bias", "factor bias"),
        ("lora_B.default.bias", "factor bias"),
        ("lora_embedding_A", "embedding"),
        ("lora_embedding_B.default", "embedding"),
        ("token_adapter.trainable_tokens_delta", "token"),
        ("base_layer.weight", "base copy"),
        ("bias", "bias"),
        ("weight", "module"),
        ("modules_to_save.default.weight", "module"),
        ("lora_a", "mlx"),
        ("lora_down.weight", "image"),
        ("something", "unknown"),
    ],
)
def test_other_parts_are_told_apart(tail, part):
    assert parse_key(f"base_model.model.{Q}.{tail}").part == part


def test_other_formats_are_told_apart():
    assert parse_key("blk.3.attn_q.weight.lora_a").part == "gguf"
    assert parse_key("lora_unet_down_blocks_0.alpha").part == "image"
    assert parse_key("lora_te1_text_model.lora_up.weight").part == "image"


@pytest.mark.parametrize("home", ["model.", "model.language_model.", "language_model.model.", ""])
@pytest.mark.parametrize("written", ["model.", "model.language_model.", "language_model.model.", ""])
def test_the_text_model_is_found_wherever_it_sits(home, written):
    names = BaseModules([f"{home}layers.0.self_attn.q_proj"])
    assert names.find(f"{written}layers.0.self_attn.q_proj") == f"{home}layers.0.self_attn.q_proj"
    assert names.find("model.vision_tower.layers.0.self_attn.q_proj") is None


def test_of_two_homes_neither_is_guessed():
    names = BaseModules(["model.layers.0.q_proj", "language_model.layers.0.q_proj"])
    assert names.find("layers.0.q_proj") is None
    assert names.find("model.layers.0.q_proj") == "model.layers.0.q_proj"


def test_near_names_a_sibling():
    names = BaseModules(["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"])
    assert names.near(Q) == "model.layers.0.self_attn.qkv_proj"
    assert names.near("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.gate_up_proj"
    assert names.near("model.layers.7.mlp.up_proj") is None


def test_a_bare_base_model_prefix_is_found_too():
    key = parse_key(f"base_model.{Q}.lora_A.weight")
    assert BaseModules([Q]).find(key.module) == Q


@pytest.mark.parametrize(
    ("module", "idle"),
    [
        ("model.vision_tower.encoder.layers.0.q_proj", True),
        ("vision_tower.encoder.layers.0.q_proj", True),
        ("model.vision_tower", True),
        ("model.vision_tower_2.encoder.layers.0.q_proj", False),
        ("model.language_model.vision_tower2.q_proj", False),
        ("model.layers.0.vision_tower.q_proj", False),
        (Q, False),
    ],
)
def test_what_is_in_an_idle_part_is_told_by_whole_names(module, idle):
    assert BaseModules([Q], ["model.vision_tower"]).is_idle(module) is idle
