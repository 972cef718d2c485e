"""peft itself as the oracle: an adapter that it saved is read with the scale and factors that it uses."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapters.errors import AdapterError
from adapters.peft_format import read_adapter
from adapters.peft_targets import conditions
from tests.adapters.samples import LAYERS, make_layout, shapes

LAYOUT = make_layout()
FILE = "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        for part in ("self_attn", "mlp"):
            at = f"model.layers.{layer}.{part}."
            linears = {
                module.removeprefix(at): nn.Linear(*shapes(LAYOUT, module), bias=False)
                for module in LAYOUT.modules
                if module.startswith(at)
            }
            self.add_module(part, nn.ModuleDict(linears))


class Base(nn.Module):
    """Linears under the names of the layout; it is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block(layer) for layer in range(LAYERS))


def save(folder, **settings) -> peft.PeftModel:
    model = peft.get_peft_model(Base(), peft.LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(folder)
    return model


CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 9, "lora_alpha": 8, "use_rslora": True},
    "rank pattern": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 20}},
    "alpha pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"layers\.0\..*": 3, "q_proj": 5}},
    "full names": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 1},
    },
    "all patterns": {
        "r": 5,
        "lora_alpha": 7,
        "use_rslora": True,
        "rank_pattern": {".*layers.1.*": 2, ".*proj": 3},
        "alpha_pattern": {"(q|v)_proj": 11, "self_attn.*": 13},
    },
    "some layers": {"r": 4, "lora_alpha": 8, "layers_to_transform": [1]},
    "fan in fan out": {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_deltas_are_those_of_peft(tmp_path, name):
    save(tmp_path, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], **CONFIGS[name])
    # Read back by peft: it saves patterns sorted by key, so the first match may not be that of training.
    model = peft.PeftModel.from_pretrained(Base(), tmp_path)
    adapter = read_adapter(tmp_path, "g", LAYOUT, torch.float32, 64)
    found = {LAYOUT.sites[delta.site].members[delta.member].module: delta for delta in adapter.deltas}
    layers = {
        module.removeprefix("base_model.model."): layer
        for module, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert found.keys() == layers.keys()
    for module, layer in layers.items():
        delta = found[module]
        assert delta.scale == layer.scaling["default"]
        assert torch.equal(delta.a, layer.lora_A["default"].weight)
        assert torch.equal(delta.b, layer.lora_B["default"].weight.t())
        whole = delta.scale * (delta.b.t() @ delta.a)
        torch.testing.assert_close(whole, layer.get_delta_weight("default"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_kind_is_refused_with_its_conversion_which_is_read(tmp_path):
    config = peft.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False)
    model = peft.get_peft_model(Base(), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="save_as_lora"):
        read_adapter(tmp_path, "g", LAYOUT, torch.float32, 64)
    peft.save_as_lora(tmp_path / "lora", model, rank=16)  # all that these matrices have
    for delta in read_adapter(tmp_path / "lora", "g", LAYOUT, torch.float32, 64).deltas:
        module = LAYOUT.sites[delta.site].members[delta.member].module
        wanted = model.base_model.model.get_submodule(module).get_delta_weight("default")
        torch.testing.assert_close(delta.scale * (delta.b.t() @ delta.a), wanted, atol=1e-5, rtol=1e-4)


COMPILED = {
    "every linear": {"target_modules": "all-linear"},
    "patterns by full names": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"_orig_mod.model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {
            r"_orig_mod\.model\.layers\.1\..*": 64,
            "_orig_mod.model.layers.0.self_attn.q_proj": 3,
        },
    },
    "a pattern for whatever follows": {
        "target_modules": ["q_proj"],
        "alpha_pattern": {r"_orig_mod.*layers\.1\..*": 64},
    },
    "an expression": {"target_modules": r"_orig_mod\.model\.layers\.\d+\.mlp\..*"},
    "but one": {
        "target_modules": "all-linear",
        "exclude_modules": ["_orig_mod.model.layers.0.self_attn.q_proj"],
    },
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_the_names_of_a_compiled_base_are_those_of_the_base(tmp_path, name):
    """torch.compile before peft: `_orig_mod` is in the names of tensors, and in those that the config has."""
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **COMPILED[name])
    model = peft.get_peft_model(torch.compile(Base()), config)
    model.save_pretrained(tmp_path)
    assert "_orig_mod" in (tmp_path / "adapter_config.json").read_text()
    deltas = read_adapter(tmp_path, "g", LAYOUT, torch.float32, 64).deltas
    found = {LAYOUT.sites[delta.site].members[delta.member].module: delta.scale for delta in deltas}
    assert found == {
        module.removeprefix("base_model.model._orig_mod."): layer.scaling["default"]
        for module, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["o_proj"]},
        {"alora_invocation_tokens": [1]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_peft_saves_for_other_features_is_refused(tmp_path, settings):
    save(tmp_path, target_modules=["q_proj"], **settings)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path, "g", LAYOUT, torch.float32, 64)
    assert caught.value.code == "unsupported_adapter_feature"


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, dict[str, object]] = {
    "as saved": {},
    "one name": {"target_modules": ["q_proj"]},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "1.mlp.up_proj", "proj"]},
    "all linear": {"target_modules": "All-Linear"},
    "an expression": {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj"},
    "an expression of the end": {"target_modules": ".*[qk]_proj"},
    "a name is barred": {"exclude_modules": ["q_proj", "model.layers.1.mlp.up_proj", "mlp"]},
    "an expression is barred": {"exclude_modules": r".*\.mlp\..*"},
    "all linear but one": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "a layer": {"layers_to_transform": 1},
    "layer zero": {"layers_to_transform": 0},
    "layers": {"layers_to_transform": [1, 7]},
    "no layers": {"layers_to_transform": []},
    "a layer by its pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "a layer by patterns": {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    "a layer by a full name": {
        "target_modules": ["model.layers.0.mlp.up_proj", "q_proj"],
        "layers_to_transform": [1],
    },
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_modules_that_peft_leaves_out_are_told(tmp_path, name):
    """Every module has its tensors, and the config was changed after the training."""
    save(tmp_path, target_modules=ALL)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | TARGETS[name]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = peft.PeftModel.from_pretrained(Base(), tmp_path)
    adapted = {
        module.removeprefix("base_model.model.")
        for module, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    met = {module for module in LAYOUT.modules if all(meets(module) for meets in conditions(config))}
    assert met == adapted
    if adapted == set(LAYOUT.modules):
        read_adapter(tmp_path, "g", LAYOUT, torch.float32, 64)
        return
    with pytest.raises(AdapterError, match="is not a module that the config targets") as caught:
        read_adapter(tmp_path, "g", LAYOUT, torch.float32, 64)
    assert caught.value.code == "invalid_adapter"
    assert {finding.where for finding in caught.value.findings[:5]} <= set(LAYOUT.modules) - adapted


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*.*.*.*(q|k)_proj"},
        {"target_modules": "("},
        {"target_modules": 5, "exclude_modules": {"a": 1}},
        {"target_modules": None},
        {"target_modules": ["q_proj"], "layers_to_transform": ["1"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "("},
    ],
)
def test_what_cannot_be_told_of_targets_refuses_nothing(settings):
    assert all(meets("model.layers.0.self_attn.q_proj") for meets in conditions(settings))


def test_peft_loads_a_matrix_of_the_base_and_it_is_refused(tmp_path):
    save(tmp_path, target_modules=["q_proj"])
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    trained = {f"{module}.base_layer.weight": torch.randn(LAYOUT.sites[0].members[0].out_features, 16)}
    save_file(load_file(tmp_path / FILE) | trained, tmp_path / FILE)
    model = peft.PeftModel.from_pretrained(Base(), tmp_path)
    loaded = model.get_submodule(module).base_layer.weight
    assert torch.equal(loaded, trained[f"{module}.base_layer.weight"])
    with pytest.raises(AdapterError, match="a matrix of the base as it was in training"):
        read_adapter(tmp_path, "g", LAYOUT, torch.float32, 64)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pissa_is_refused_and_its_conversion_is_read(tmp_path):
    config = peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"])
    base = Base()
    before = base.model.layers[0].self_attn["q_proj"].weight.detach().clone()
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, values in model.named_parameters():
        if "lora_" in name:
            values.data.add_(0.1)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        read_adapter(tmp_path / "raw", "g", LAYOUT, torch.float32, 64)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    delta = read_adapter(tmp_path / "plain", "g", LAYOUT, torch.float32, 64).deltas[0]
    layer = base.model.layers[0].self_attn["q_proj"]
    wanted = layer.get_base_layer().weight + layer.get_delta_weight("default") - before
    torch.testing.assert_close(delta.scale * (delta.b.t() @ delta.a), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_fresh_adapter_of_peft_is_refused(tmp_path):
    peft.get_peft_model(Base(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="changes nothing"):
        read_adapter(tmp_path, "g", LAYOUT, torch.float32, 64)
