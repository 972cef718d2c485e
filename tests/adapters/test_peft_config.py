"""The config whitelist: what peft writes by default passes, what changes a result is refused."""

from __future__ import annotations

import json
import math
import time

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from adapters.errors import AdapterError
from adapters.findings import Findings
from adapters.peft_config import NO_EFFECT, REFUSED, USED, Trained, parse_config
from adapters.peft_patterns import _steps
from tests.adapters.samples import make_config

MODULES = [
    f"model.layers.{layer}.{part}" for layer in (0, 1, 10) for part in ("self_attn.q_proj", "mlp.up_proj")
]


def parse(**settings):
    findings = Findings()
    config = parse_config(json.dumps(make_config(**settings)).encode(), findings)
    findings.raise_if_any("the adapter")
    assert config is not None
    return config


def refused(**settings) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        parse(**settings)
    return caught.value


def test_every_setting_of_the_installed_peft_is_known():
    assert set(peft.LoraConfig().to_dict()) <= USED | NO_EFFECT | set(REFUSED)


def test_what_peft_writes_by_default_passes(tmp_path):
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(
        tmp_path
    )
    findings = Findings()
    config = parse_config((tmp_path / "adapter_config.json").read_bytes(), findings)
    assert not findings.all()
    assert (config.rank, config.alpha, config.rslora) == (4, 8, False)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"alora_invocation_tokens": [1, 2]},
        {"lora_bias": True},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"trainable_token_indices": [7]},
        {"layer_replication": [[0, 2]]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 3}},
        {"kasa_config": {"x": 1}},
        {"monteclora_config": {"x": 1}},
        {"velora_config": {"x": 1}},
        {"megatron_config": {"x": 1}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_features_that_change_the_result_are_refused_by_name(settings):
    error = refused(**settings)
    assert error.code == "unsupported_adapter_feature"
    assert next(iter(settings)) in str(error)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new", {"a": 1}, None]
)
def test_inits_that_change_the_base_are_refused(init):
    error = refused(init_lora_weights=init)
    assert error.code == "unsupported_adapter_feature"
    assert "init_lora_weights" in str(error)
    assert "path_initial_model_for_weight_conversion" in str(error)


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_alone_pass(init):
    parse(init_lora_weights=init)


def test_unknown_settings_are_refused_only_if_they_say_something():
    parse(new_thing=None, other=False, more=[], yet={}, zero=0)
    error = refused(new_thing=True, other="x")
    assert error.code == "unsupported_adapter_feature"
    assert '"new_thing"' in str(error)
    assert '"other"' in str(error)


def test_settings_without_effect_pass():
    parse(
        bias="all",
        lora_dropout=0.5,
        megatron_core="megatron.core",
        qalora_group_size=16,
        runtime_config={"ephemeral_gpu_offload": True},
        eva_config={"rho": 2.0},
        loftq_config={"loftq_bits": 4},
        corda_config={"x": 1},
        lora_ga_config={"x": 1},
        auto_mapping={"unsloth_fixed": True},
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
        ensure_weight_tying=True,
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"peft_type": "LORA", "r": NaN}', "NaN"),
        (b"{}", "names no peft_type"),
        (b'{"peft_type": "IA3"}', "only LORA is served"),
        (b'{"fine_tune_type": "lora", "lora_parameters": {"scale": 20}}', "mlx-lm"),
    ],
)
def test_other_files_are_refused(data, said):
    findings = Findings()
    assert parse_config(data, findings) is None
    assert said in str(findings.all()[0])


@pytest.mark.parametrize("rank", [0, -1, 1.5, "8", True, None, [8], 2**40])
def test_r_must_be_a_whole_number(rank):
    assert "not a whole number above 0" in str(refused(r=rank))


@pytest.mark.parametrize("alpha", ["16", True, None, 1e300])
def test_alpha_must_be_a_number(alpha):
    assert "not a finite number" in str(refused(lora_alpha=alpha))


def test_scale():
    assert parse(lora_alpha=32).scale(Trained(8, 32)) == 4
    assert parse(lora_alpha=32, use_rslora=True).scale(Trained(8, 32)) == 32 / math.sqrt(8)


KEYS = st.one_of(
    st.sampled_from(
        [
            *MODULES,
            "q_proj",
            "up_proj",
            "proj",
            "model.layers.1",
            "layers.1.self_attn.q_proj",
            ".*q_proj",
            r"layers\.\d+\.self_attn\.q_proj",
            r"^model\.layers\.0\..*",
            "(q|up)_proj",
            "q_proj|up_proj",
            r"layers.(0|1).*",
            r"[a-z_]+\.q_pro\w",
            "q_proj$",
            "(?:self_attn|mlp).up_proj",
            "",
        ]
    ),
)


@given(st.dictionaries(KEYS, st.integers(1, 9), max_size=5))
def test_patterns_match_as_in_peft(pattern):
    config = parse(rank_pattern=pattern, alpha_pattern={key: value + 100.5 for key, value in pattern.items()})
    found = config.trained(MODULES, Findings())
    for module in MODULES:
        key = get_pattern_key(pattern.keys(), module)
        assert found[module].rank == pattern.get(key, 4)
        assert found[module].alpha == (pattern[key] + 100.5 if key in pattern else 8)


@pytest.mark.parametrize(
    "key",
    [
        *("(", "(a+)+x", "(a|a)*", "(.*)*", ".*.*.*.*.*x", "(?i)q", "a" * 9000, "(a{1,9}){9}"),
        *(
            r"(\w+\.)+x",
            "((a)+)+",
            "(a??){9}",
            "(?#[)(a+)+(?#])",
            "(?x: # [\n (a+)+ # ]\n)",
            "(?P<a>.)(?P=a)+",
            "(){9999}",
            "(?=){9999}",
        ),
        *("[a", ")", "a)|(b"),
    ],
)
def test_patterns_that_cannot_be_matched_are_findings(key):
    for name in ("rank_pattern", "alpha_pattern"):
        error = refused(**{name: {key: 8}})
        assert error.code == "invalid_adapter"
        assert len(error.findings) == 1
        assert name in str(error)


LAYERS = "|".join(f"model.layers.{layer}.self_attn.q_proj" for layer in range(28))


@pytest.mark.parametrize(
    ("key", "fits"),
    [
        (LAYERS, "model.layers.27.self_attn.q_proj"),
        (r"(model\.)?layers\.(\d)+\.self_attn\.q_proj", "model.layers.27.self_attn.q_proj"),
        (
            r"(?:model\.)?layers\.(?P<layer>[0-9]{1,2})\.(self_attn|mlp)\.[qkv]_proj",
            "layers.3.self_attn.k_proj",
        ),
        (r"[]|(+*)a-z_.0-9]+\.q_proj", "model.layers.0.self_attn.q_proj"),
        (r"(?<=\.)(q|k|v|o)_proj(?!\w)", "model.layers.0.self_attn.o_proj"),
    ],
)
def test_patterns_that_do_no_harm_are_matched(key, fits):
    assert len(LAYERS) > 512
    config = parse(rank_pattern={key: 9})
    found = config.trained([fits, "model.layers.0.mlp.up_proj"], Findings())
    assert [trained.rank for trained in found.values()] == [9, 4]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a", 1),
        ("a|b|c", 3),
        ("(a|b)(c|d)", 4),
        ("a?b", 2),
        ("a+(b|c)?", 192),
        (r"\(a\)*", 64),
        ("(a)*", 64),
        ("(a|b)*", math.inf),
    ],
)
def test_steps_are_the_ways_to_match(text, steps):
    assert _steps(text) == steps


@pytest.mark.parametrize("sign", ["*", "?", "+", "{"])
def test_hundreds_of_repeats_are_a_finding(sign):
    assert "takes too long to match" in str(refused(rank_pattern={f"a{sign}" * 250: 4}))


def test_text_that_is_no_unicode_can_be_told_of():
    assert parse(base_model_name_or_path="x\ud800y").base_model == "x?y"
    for settings in ({"rank_pattern": {"(?<\ud800": 4}}, {"odd\ud800": "\ud800"}):
        str(refused(**settings)).encode()


def test_the_base_models_name_is_cut():
    assert parse(base_model_name_or_path="x" * 1000).base_model == "x" * 256


@pytest.mark.parametrize("value", [0, -4, "8", None, True, 2.5])
def test_pattern_ranks_are_whole_numbers(value):
    assert "not a whole number above 0" in str(refused(rank_pattern={"q_proj": value}))


def test_a_pattern_table_is_an_object():
    assert "not a JSON object" in str(refused(alpha_pattern=[["q_proj", 8]]))


def test_the_costliest_patterns_that_pass_are_bounded():
    config = parse(rank_pattern={".*.*x.*": 1, "(.|.|.)(.|.|.)(.|.|.)(.|.|.)(.|.|.)y": 2})
    start = time.monotonic()
    config.trained(["." * 30 + "a" * 60] * 3, Findings())
    assert time.monotonic() - start < 10


def test_hundreds_of_full_names_are_matched_fast():
    modules = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(80) for part in "qkvo"]
    config = parse(rank_pattern=dict.fromkeys(modules, 16))
    start = time.monotonic()
    assert all(trained.rank == 16 for trained in config.trained(modules, Findings()).values())
    assert time.monotonic() - start < 3
