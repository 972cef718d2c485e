"""From a checkpoint to a model held as asked: quantized once, read back the same ever after, refused with a reason."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Gemma4Config, MixtralConfig, T5Config, XLNetConfig

from server.config import SettingsError
from server.errors import UnsupportedModelError
from server.model import load
from server.model.linear import DenseLinear, FourBitLinear, Int8Linear, ModuleLinear
from server.model.load import ModelSource, kind_of_weights, load_model
from server.model.servable import make_servable
from tests.equivalence.architectures import tiny_config, tiny_model
from tests.model.tiny import SIZES, make_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_model().save_pretrained(folder)
    return folder


def source(folder, quantization, cache=None, dtype=torch.float32):
    return ModelSource(str(folder), CPU, dtype, quantization, cache)


def q_proj(model):
    return model.model.layers[0].self_attn.q_proj


def copies(cache):
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize(
    ("quantization", "kind"), [("nf4", Linear4bit), ("int8", Linear8bitLt), ("none", nn.Linear)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_as_asked(folder, tmp_path, quantization, kind, dtype):
    model = load_model(source(folder, quantization, tmp_path / "cache", dtype))
    assert type(q_proj(model)) is kind
    assert type(model.lm_head) is nn.Linear
    assert model.model.norm.weight.dtype is dtype
    assert (tmp_path / "cache").exists() == (quantization != "none")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_copy_gives_the_same_weights_and_is_read_instead(folder, tmp_path, quantization, monkeypatch):
    direct = load_model(source(folder, quantization))
    first = load_model(source(folder, quantization, tmp_path))
    assert len(copies(tmp_path)) == 1
    reads = []
    original = load._read
    monkeypatch.setattr(load, "_read", lambda f, c, s, q: reads.append((f, q)) or original(f, c, s, q))
    second = load_model(source(folder, quantization, tmp_path))
    assert reads == [(tmp_path / copies(tmp_path)[0], None)]
    want = direct.state_dict()
    for model in (first, second):
        got = model.state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_copy_made_in_another_dtype_is_not_taken(folder, tmp_path):
    """A copy holds what is not quantized in the dtype it was made with: rounded once, rounded for good."""
    load_model(source(folder, "nf4", tmp_path, torch.bfloat16))
    exact = load_model(source(folder, "none"))
    model = load_model(source(folder, "nf4", tmp_path))
    assert torch.equal(model.lm_head.weight, exact.lm_head.weight)
    assert torch.equal(model.get_input_embeddings().weight, exact.get_input_embeddings().weight)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantized_already_is_read_as_it_is(folder, tmp_path, quantization):
    before = load_model(source(folder, quantization))
    before.save_pretrained(tmp_path / "quantized")
    model = load_model(source(tmp_path / "quantized", "nf4", tmp_path / "cache"))
    assert type(q_proj(model)) is type(q_proj(before))
    assert torch.equal(q_proj(model).weight.data, q_proj(before).weight.data)
    assert not (tmp_path / "cache").exists()


def test_a_quantized_checkpoint_is_served_in_the_dtype_asked_for(folder, tmp_path):
    load_model(source(folder, "nf4", dtype=torch.bfloat16)).save_pretrained(tmp_path / "quantized")
    model = load_model(source(tmp_path / "quantized", "nf4"))
    assert model.dtype is torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    assert make_servable(model).dtype is torch.float32


@pytest.mark.parametrize(
    ("quantization", "backend", "kind"),
    [
        ("nf4", "exact", FourBitLinear),
        ("int8", "exact", Int8Linear),
        ("none", "exact", DenseLinear),
        ("none", "bitsandbytes", DenseLinear),
        ("nf4", "bitsandbytes", ModuleLinear),
        ("int8", "bitsandbytes", ModuleLinear),
    ],
)
def test_who_multiplies(folder, quantization, backend, kind):
    servable = make_servable(load_model(source(folder, quantization)), backend=backend)
    assert {type(group.base) for group in servable.groups} == {kind}
    assert servable.vocab_size == SIZES["vocab_size"]


def test_what_the_authors_keep_in_float32_stays_so(tmp_path):
    """A router's scores in bfloat16 would send tokens to other experts."""
    tiny_model(tiny_config("ernie4_5_moe")).save_pretrained(tmp_path)
    found = dict(load_model(source(tmp_path, "none", dtype=torch.bfloat16)).named_parameters())
    assert found["model.layers.1.mlp.gate.weight"].dtype is torch.float32
    assert found["model.layers.1.mlp.experts.down_proj"].dtype is torch.bfloat16


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(
        UnsupportedModelError, match="nobody/nothing cannot be served: it is not a folder here"
    ):
        load_model(source("nobody/nothing", "none"))


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="configuration cannot be read"):
        load_model(source(tmp_path, "none"))


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match="cannot be served"):
        load_model(source(tmp_path, "none"))


def broken(folder, to, change):
    """A copy of the checkpoint whose tensors `change` has altered."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    "lacking", ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_not_there_are_not_made_up(folder, tmp_path, quantization, lacking):
    made = broken(folder, tmp_path / "made", lambda tensors: tensors.pop(lacking))
    with pytest.raises(UnsupportedModelError, match=f"lack 1 weights of LlamaForCausalLM.*{lacking}"):
        load_model(source(made, quantization, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists() or copies(tmp_path / "cache") == []


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("setting", [("intermediate_size", 128), ("num_hidden_layers", 3)])
def test_weights_of_another_configuration_are_refused(folder, tmp_path, quantization, setting):
    made = broken(folder, tmp_path / "made", lambda tensors: None)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | dict([setting])))
    with pytest.raises(UnsupportedModelError, match=r"cannot be served"):
        load_model(source(made, quantization))


def test_weights_that_nothing_uses_are_said(folder, tmp_path, caplog):
    made = broken(folder, tmp_path / "made", lambda tensors: tensors.update(stranger=torch.zeros(2)))
    load_model(source(made, "none"))
    assert "1 weights that the model does not use, stranger among them" in caplog.text


def test_a_file_that_is_cut_short_is_named(folder, tmp_path):
    made = broken(folder, tmp_path / "made", lambda tensors: None)
    whole = (made / "model.safetensors").read_bytes()
    (made / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsupportedModelError, match=str(made)):
        load_model(source(made, "nf4"))


def test_a_copy_that_cannot_be_read_is_made_again(folder, tmp_path, caplog):
    want = load_model(source(folder, "nf4", tmp_path)).state_dict()
    (copy,) = tmp_path.iterdir()
    (copy / "model.safetensors").unlink()  # the first one is still mapped
    (copy / "model.safetensors").write_bytes(b"no tensors")
    got = load_model(source(folder, "nf4", tmp_path)).state_dict()
    assert "made again" in caplog.text
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), ImportError("no package")])
def test_a_copy_outlives_what_is_not_its_fault(folder, tmp_path, monkeypatch, error):
    load_model(source(folder, "nf4", tmp_path))
    before = copies(tmp_path)

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UnsupportedModelError, match=str(error)):
        load_model(source(folder, "nf4", tmp_path))
    assert copies(tmp_path) == before


def test_what_the_authors_say_of_sampling_is_read_anew(folder, tmp_path):
    """It may be edited while the quantized copy of the weights stays as it is."""
    made = broken(folder, tmp_path / "made", lambda tensors: None)
    load_model(source(made, "nf4", tmp_path / "cache"))
    generation = json.loads((made / "generation_config.json").read_text())
    (made / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, 44]}))
    assert load_model(source(made, "nf4", tmp_path / "cache")).generation_config.eos_token_id == [2, 44]
    assert len(copies(tmp_path / "cache")) == 1
    (made / "generation_config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="generation_config"):
        load_model(source(made, "none"))


def test_a_cache_that_is_no_folder_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"--quantized-cache .*file: cannot be used"):
        load_model(source(folder, "nf4", tmp_path / "file"))


@pytest.mark.parametrize(
    ("trusted", "names"),
    [
        (False, ["config.json", "model-1.safetensors", "tokenizer.model"]),
        (True, ["config.json", "mine.py", "model-1.safetensors", "tokenizer.model"]),
    ],
)
def test_what_is_fetched_from_the_hub(folder, monkeypatch, trusted, names):
    """Weights once, and code only where it may run."""
    held = ["config.json", "mine.py", "model-1.safetensors", "tokenizer.model", "pytorch_model.bin"]
    held += ["consolidated.safetensors", "fp16/model.safetensors", "onnx/config.json"]
    fetched = []

    def snapshot_download(name, **patterns):
        fetched.extend(filter_repo_objects(held, **patterns))
        return str(folder)

    monkeypatch.setattr(load, "snapshot_download", snapshot_download)
    load_model(ModelSource("some/base", CPU, torch.float32, "none", None, trusted))
    assert sorted(fetched) == names


def test_a_repository_without_safetensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "snapshot_download", lambda name, **patterns: str(tmp_path))
    with pytest.raises(UnsupportedModelError, match=r"no weights as \.safetensors"):
        load_model(source("some/base", "none"))


@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "nf4"), ("int8", "int8"), ("none", "float32")])
def test_what_the_weights_are_is_said(folder, quantization, kind):
    assert kind_of_weights(load_model(source(folder, quantization))) == kind


def test_a_table_of_an_image_tower_is_no_expert(tmp_path):
    """Gemma 4 has one of three dimensions, beside a text model of which every linear can be quantized."""
    images = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    images |= {"num_key_value_heads": 2, "head_dim": 16}
    text = SIZES | {"head_dim": 32, "global_head_dim": 32, "vocab_size_per_layer_input": SIZES["vocab_size"]}
    model = make_model(Gemma4Config(text_config=text, vision_config=images))
    assert any(parameter.ndim == 3 for parameter in model.model.vision_tower.parameters())
    model.save_pretrained(tmp_path / "made")
    servable = make_servable(load_model(source(tmp_path / "made", "nf4")))
    assert servable.layout.idle == ("model.vision_tower", "model.embed_vision")


@pytest.mark.parametrize("kept", [False, True])
def test_experts_are_refused_quantized_before_weights_are_read(tmp_path, kept, monkeypatch):
    made, cache = tmp_path / "moe", tmp_path / "cache" if kept else None
    make_model(MixtralConfig(num_local_experts=4, **SIZES)).save_pretrained(made)
    with monkeypatch.context() as patched:
        patched.setattr("server.model.load._read", None)
        with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM .* --quantization none"):
            load_model(source(made, "nf4", cache))
    assert not kept or copies(cache) == []
    assert load_model(source(made, "none")).config.num_local_experts == 4


def test_a_text_longer_than_the_models_is_refused_before_weights_are_read(folder, monkeypatch):
    made_for = SIZES["max_position_embeddings"]
    load_model(replace(source(folder, "none"), max_model_len=made_for))
    monkeypatch.setattr("server.model.load._read", None)
    with pytest.raises(SettingsError, match=rf"--max-model-len {made_for + 1}: .* for {made_for} tokens"):
        load_model(replace(source(folder, "nf4"), max_model_len=made_for + 1))


def test_a_tower_that_lost_its_quantization_hides_nothing(folder):
    """transformers writes and reads some towers' weights under different names."""
    model = load_model(source(folder, "nf4"))
    first = next(module for module in model.modules() if isinstance(module, Linear4bit))
    first.weight = nn.Parameter(first.weight.data, requires_grad=False)
    assert kind_of_weights(model) == "nf4"


def test_a_model_without_an_end_is_not_told_one(tmp_path):
    """XLNet says that it was made for -1 tokens."""
    config = XLNetConfig(vocab_size=64, d_model=64, n_layer=2, n_head=4, d_inner=96)
    make_model(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="does not say how long a text may be"):
        make_servable(load_model(source(tmp_path, "none")))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_model_of_code_of_its_own_is_read_if_that_is_trusted(tmp_path, quantization, monkeypatch):
    """transformers knows no such configuration, nor which model is for it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    made = tmp_path / "made"
    make_model().save_pretrained(made)
    (made / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    given = json.loads((made / "config.json").read_text())
    given |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (made / "config.json").write_text(json.dumps(given))
    asked = source(made, quantization, tmp_path / "cache")
    for _ in range(2):  # and from its copy
        model = load_model(replace(asked, trust_remote_code=True))
        assert type(model).__name__ == "OwnForCausalLM"
    with pytest.raises(UnsupportedModelError, match="trust_remote_code"):
        load_model(asked)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_what_is_no_causal_model_is_refused(tmp_path, quantization):
    T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="has no causal language model of type t5"):
        load_model(source(tmp_path, quantization))


def test_another_attention_than_ours_may_be_named(folder, tmp_path):
    """A checkpoint that was trained with flash attention may say so."""
    made = tmp_path / "made"
    shutil.copytree(folder, made)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"attn_implementation": "flash_attention_2"}))
    assert type(q_proj(load_model(source(made, "nf4")))) is Linear4bit
