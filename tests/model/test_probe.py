"""What the probe learns of an architecture, and how it words its refusals."""

import contextlib

import pytest
import torch
import transformers
from torch import nn

from server.errors import UnsupportedModelError
from server.model.attention import IMPLEMENTATION, register
from server.model.linear import LoRALinear, Unadapted
from server.model.probe import probe
from server.model.servable import make_servable
from tests.model.tiny import SIZES, make_model

QKV, OUT, GATE_UP, DOWN = (
    "self_attn.q_proj+k_proj+v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj+up_proj",
    "mlp.down_proj",
)
BY_N_EMBD = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (transformers.LlamaConfig(**SIZES), [QKV, OUT, GATE_UP, DOWN]),
        (transformers.Phi3Config(**SIZES), ["self_attn.qkv_proj", OUT, "mlp.gate_up_proj", DOWN]),
        (transformers.MixtralConfig(num_local_experts=4, **SIZES), [QKV, OUT]),
        (
            transformers.GPTNeoXConfig(**NEOX),
            ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        ),
    ],
    ids=["llama", "phi3", "mixtral", "gpt neox"],
)
def test_groups(config, groups):
    """Siblings that read one input are one group, fused or not; gpt neox runs attention and MLP side by side."""
    servable = make_servable(make_model(config))
    assert list(servable.layout.groups) == groups
    assert len(servable.layout.sites) == 2 * len(groups)


def test_sites_are_the_models_linears_but_for_the_head():
    model = make_model()
    linears = {name: m.out_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    del linears["lm_head"]
    layout = make_servable(model).layout
    assert {m.module: m.out_features for site in layout.sites for m in site.members} == linears
    assert [site.in_features for site in layout.sites[:4]] == [64, 64, 64, 96]


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def test_what_no_text_passes_through_is_idle():
    text = SIZES | {"head_dim": 16}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    layout = make_servable(make_model(config)).layout
    assert layout.idle == ("model.vision_tower",)
    assert all(module.startswith("model.language_model.layers.") for module in layout.modules)


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SIZES),
        transformers.MixtralConfig(num_local_experts=4, **SIZES),
        transformers.GPTNeoXConfig(**NEOX),
    ],
    ids=["llama", "mixtral", "gpt neox"],
)
def test_a_text_model_has_nothing_idle(config):
    assert probe(_attending(make_model(config))).layout.idle == ()


def test_an_expert_that_the_probe_did_not_reach_is_not_idle():
    """Nor anything else inside of the text model."""
    model = _attending(make_model())
    model.model.layers[0].mlp.expert = nn.Linear(64, 64)
    model.tower = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert probe(model).layout.idle == ("tower",)


def test_where_the_text_model_is_the_whole_nothing_is_idle():
    model = _attending(make_model())
    model.model.layers[0].mlp.expert = nn.Linear(64, 64)
    model.get_decoder = lambda: model
    assert probe(model).layout.idle == ()


def _attending(model):
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def test_what_attention_needs():
    config = transformers.Gemma2Config(head_dim=32, sliding_window=8, **SIZES)
    layers = make_servable(make_model(config)).attention
    assert [layer.window for layer in layers] == [8, None]
    assert {(layer.kv_heads, layer.k_width, layer.v_width) for layer in layers} == {(2, 32, 32)}


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        (transformers.GPTJConfig(rotary_dim=8, **BY_N_EMBD), "GPTJForCausalLM", "saw 0 of 2 layers"),
        (
            transformers.FalconConfig(
                vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
            ),
            "FalconForCausalLM",
            "saw 0 of 2 layers",
        ),
        (transformers.GPT2Config(**BY_N_EMBD), "GPT2LMHeadModel", "no nn.Linear"),
        (
            transformers.Llama4TextConfig(
                head_dim=16, num_local_experts=2, intermediate_size_mlp=96, **SIZES
            ),
            "Llama4ForCausalLM",
            "layers of type chunked_attention; only",
        ),
        (
            transformers.BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4),
            "BloomForCausalLM",
            "max_position_embeddings",
        ),
    ],
    ids=["gptj", "falcon", "gpt2", "llama4", "bloom"],
)
def test_a_refusal_names_the_architecture_and_the_reason(config, name, reason):
    with pytest.raises(UnsupportedModelError) as refused:
        make_servable(make_model(config))
    assert name in str(refused.value)
    assert reason in str(refused.value)


TEXT = {"vocab_size": 64, "d_model": 64, "max_position_embeddings": 64, "decoder_layers": 2, "encoder_layers": 2,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 96}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BertConfig(**NEOX), "not causal"),
        (transformers.RobertaConfig(is_decoder=True, **NEOX), "a rule of its own"),
        (transformers.BartConfig(**TEXT), "a rule of its own"),
        (transformers.DiffLlamaConfig(**SIZES), "a layer attends more than once"),
    ],
    ids=["bert", "roberta", "bart", "diffllama"],
)
def test_what_would_be_answered_wrongly_is_refused(config, reason):
    """BERT's tokens see those after them; RoBERTa numbers a text from 2 on, BART all texts of a step as one."""
    with pytest.raises(UnsupportedModelError, match=reason):
        make_servable(make_model(config))


class _Mixes(nn.Module):
    """A part of a model, and what its answer to a row has to do with the other rows of a step."""

    def __init__(self, inner, mix):
        super().__init__()
        self.inner, self.mix = inner, mix

    def forward(self, x):
        return self.mix(self.inner(x))


MIXES = {
    "the row before": lambda x: x + torch.cat([x[:, :1], x[:, :-1]], dim=1),
    "the last row": lambda x: x + x[:, -1:],
    "the mean": lambda x: x + x.mean(1, keepdim=True),
    "the mean so far": lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None],
    "how many rows": lambda x: x + x.shape[1],
    "the place": lambda x: x + torch.arange(x.shape[1])[:, None],
    "the range": lambda x: (x - x[:, :1]) / (x.amax(1) - x.amin(1))[:, None],  # of one row: not a number
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(
    "part",
    ["model.embed_tokens", "model.layers.1.input_layernorm", "model.layers.1.mlp.act_fn", "model.norm"],
)
def test_what_mixes_rows_is_refused(mix, part):
    model = make_model()
    model.set_submodule(part, _Mixes(model.get_submodule(part), mix))
    with pytest.raises(UnsupportedModelError, match="mixes tokens outside of attention"):
        make_servable(model)


@pytest.mark.parametrize("mix", [MIXES["the row before"], MIXES["the mean"]], ids=["shift", "mean"])
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_what_mixes_rows_before_it_attends_is_refused(mix, part):
    model = make_model()
    for layer in model.model.layers:
        setattr(layer.self_attn, part, _Mixes(getattr(layer.self_attn, part), mix))
    with pytest.raises(UnsupportedModelError, match="mixes tokens outside of attention"):
        make_servable(model)


class _ByPlace(nn.Module):
    """Turns a row by its place in the step, whatever position it is given."""

    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary

    def forward(self, x, position_ids):
        return self.rotary(x, torch.arange(x.shape[1])[None])


def test_a_rotation_by_place_is_refused():
    model = make_model()
    model.model.rotary_emb = _ByPlace(model.model.rotary_emb)
    with pytest.raises(UnsupportedModelError, match="a rule of its own"):
        make_servable(model)


def test_logits_that_are_not_asked_for_are_refused():
    """A runner would read a prompt's first rows as its last."""

    class Eager(transformers.LlamaForCausalLM):
        def forward(self, *args, logits_to_keep, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(UnsupportedModelError, match="computes the logits of all tokens, whichever"):
        make_servable(Eager(transformers.LlamaConfig(**SIZES)).eval())


def test_logits_that_are_mixed_are_refused():
    class Mixing(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = MIXES["the mean"](out.logits)
            return out

    with pytest.raises(UnsupportedModelError, match="mixes tokens outside of attention"):
        make_servable(Mixing(transformers.LlamaConfig(**SIZES)).eval())


def test_a_linear_after_the_last_layer_is_not_adapted():
    """It reads the rows that are sampled alone, and an adapter's rows are those of the step."""
    servable = make_servable(make_model(transformers.BertConfig(is_decoder=True, **NEOX)))
    assert isinstance(servable.model.cls.predictions.transform.dense, Unadapted)
    assert servable.layout.idle == ()
    assert {member.module.split(".")[0] for site in servable.layout.sites for member in site.members} == {
        "bert"
    }


class _Experts(nn.Module):
    """A mixture of experts as models were written once: a linear each, called with the tokens that chose it."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(experts)])

    def forward(self, x):
        rows, chosen = x[0], self.router(x[0]).argmax(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                out[chosen == number] = expert(rows[chosen == number])
        return out[None]


def test_experts_that_are_linears_are_not_adapted():
    """Nor those that no token or every token of the probe chose."""
    model = make_model()
    for layer in model.model.layers:
        layer.mlp = _Experts(SIZES["hidden_size"], 8)
    layers = make_servable(model).model.model.layers
    assert all(isinstance(expert, Unadapted) for layer in layers for expert in layer.mlp.experts)
    assert all(isinstance(layer.mlp.router, LoRALinear) for layer in layers)


class _Again(nn.Module):
    """Passes a token through once more."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.cat([self.inner(self.inner(x[:, :1])), self.inner(x)], dim=1)[:, -x.shape[1] :]


def test_a_linear_that_reads_some_rows_once_is_not_adapted():
    model = make_model()
    model.model.layers[0].mlp = _Again(nn.Linear(64, 64))
    assert isinstance(make_servable(model).model.model.layers[0].mlp.inner, Unadapted)


def test_a_linear_that_computes_something_else_stays():
    """Phimoe's router is called one, and answers three tensors."""
    model = make_servable(make_model(transformers.PhimoeConfig(num_local_experts=4, **SIZES))).model
    assert type(model.model.layers[0].mlp.router).__name__ == "PhimoeTopKRouter"


class _Asks(nn.Module):
    """An attention layer that asks for something the paged attention does not know."""

    def __init__(self, inner, **asked):
        super().__init__()
        self.inner, self.asked = inner, asked

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs, **self.asked)


def test_unknown_arguments_of_attention_are_refused():
    model = make_model()
    model.model.layers[1].self_attn = _Asks(model.model.layers[1].self_attn, position_bias=torch.ones(1))
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .* \(position_bias\)"):
        make_servable(model)


@pytest.mark.parametrize("said", [True, False])
def test_whether_attention_is_causal_is_what_the_call_says(said):
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.is_causal = not said
        layer.self_attn = _Asks(layer.self_attn, is_causal=said)
    with contextlib.nullcontext() if said else pytest.raises(UnsupportedModelError, match="not causal"):
        make_servable(model)


def test_a_mask_of_its_own_is_refused():
    model = make_model()
    inner = model.model.layers[0].self_attn
    given = inner.forward
    inner.forward = lambda *args, **kwargs: given(*args, **(kwargs | {"attention_mask": torch.ones(1)}))
    with pytest.raises(UnsupportedModelError, match="a mask of its own"):
        make_servable(model)


def test_a_forward_pass_that_fails_is_a_refusal():
    model = make_model()
    model.model.norm = None
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM cannot be served: a forward pass"):
        make_servable(model)


def test_the_probe_puts_every_linear_back():
    model = make_model()
    before = dict(model.named_modules())
    register()
    model.set_attn_implementation("loraplex_paged")
    probe(model)
    assert dict(model.named_modules()) == before
    model.model.norm = None
    with pytest.raises(UnsupportedModelError):
        probe(model)
    del before["model.norm"]
    assert {name: m for name, m in model.named_modules() if name in before} == before


@pytest.mark.parametrize(("answers", "served"), [([False], True), ([False, False], False)])
def test_one_token_between_two_experts_is_no_reason(monkeypatch, answers, served):
    """Rounding may send it to the one in a step and to the other alone; another token is tried then."""
    left = iter(answers)
    monkeypatch.setattr("server.model.probe._alike", lambda got, want: next(left, True))
    if served:
        make_servable(make_model())
    else:
        with pytest.raises(UnsupportedModelError, match="texts cannot stand side by side"):
            make_servable(make_model())
