"""Compiled norms, MLPs and rotations take a module's place only where they give what it gives."""

import copy

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, LlamaConfig, Phi3Config
from transformers.models.llama import modeling_llama

from kernels.cpu.library import load
from kernels.segments import Spans
from server.model import kernel_set
from server.model.context import ForwardContext, forward_context
from server.model.steady import (
    CompiledMLP,
    CompiledRMSNorm,
    install_compiled_rotation,
    install_compiled_rows,
    install_steady_activations,
)
from tests.model.tiny import SIZES, make_model


@pytest.fixture
def kernels():
    found = load()
    if found is None:
        pytest.skip("the kernels are not built here")
    return kernel_set.compiled(found)


def compiled(model, kernels):
    """The model, its norms no longer all ones, before and after."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) / 3)
    original = copy.deepcopy(model)
    install_steady_activations(model, kernels.rows)
    install_compiled_rows(model, kernels.rows)
    return original, model


def counts(model):
    kinds = [type(module).__name__ for module in model.modules()]
    return kinds.count("CompiledRMSNorm"), kinds.count("CompiledMLP")


LAYERS = SIZES["num_hidden_layers"]
CONFIGS = {
    "llama": (LlamaConfig(**SIZES), (2 * LAYERS + 1, LAYERS)),
    "gemma2": (
        Gemma2Config(**SIZES, head_dim=16),
        (4 * LAYERS + 1, LAYERS),
    ),  # one more than the weight, and tanh
    "phi3": (Phi3Config(**SIZES), (2 * LAYERS + 1, 0)),  # gate and up are one linear: its MLP is left alone
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_answers_as_before(kernels, name):
    config, replaced = CONFIGS[name]
    original, model = compiled(make_model(config), kernels)
    assert counts(model) == replaced
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        want, got = original(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_modules_keep_their_paths(kernels):
    original, model = compiled(make_model(), kernels)
    linears = [
        [path for path, module in m.named_modules() if isinstance(module, nn.Linear)]
        for m in (original, model)
    ]
    assert linears[0] == linears[1]


class OddRMSNorm(nn.Module):
    """Not what its name says: the mean is taken away first."""

    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.eps = eps

    def forward(self, x):
        return nn.functional.layer_norm(x, (8,), self.weight, eps=self.eps)


class PlainRMSNorm(OddRMSNorm):
    def forward(self, x):
        return nn.functional.rms_norm(x, (8,), self.weight, self.eps)


class GatedRMSNorm(PlainRMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class OtherEpsilonRMSNorm(PlainRMSNorm):
    def forward(self, x):
        return nn.functional.rms_norm(x, (8,), self.weight, 1e-3)


@pytest.mark.parametrize(
    ("norm", "taken"),
    [(PlainRMSNorm, True), (OddRMSNorm, False), (GatedRMSNorm, False), (OtherEpsilonRMSNorm, False)],
)
def test_a_norm_is_replaced_by_what_it_does_not_by_its_name(kernels, norm, taken):
    model = nn.ModuleDict({"norm": norm()})
    install_compiled_rows(model, kernels.rows)
    assert (type(model["norm"]) is CompiledRMSNorm) == taken


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ClampedMLP(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-1, 1))


class ReluMLP(MLP):
    def __init__(self):
        super().__init__()
        self.act_fn = nn.ReLU()


@pytest.mark.parametrize(("mlp", "taken"), [(MLP, True), (ClampedMLP, False), (ReluMLP, False)])
def test_an_mlp_is_replaced_by_what_it_does(kernels, mlp, taken):
    model = nn.ModuleDict({"mlp": mlp()})
    install_steady_activations(model, kernels.rows)
    install_compiled_rows(model, kernels.rows)
    assert (type(model["mlp"]) is CompiledMLP) == taken


@pytest.fixture
def rotation(kernels, monkeypatch):
    """llama's rotation, ours in its place, and the original."""
    original = getattr(modeling_llama.apply_rotary_pos_emb, "original", modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", original)
    install_compiled_rotation(make_model(), kernels.rows)
    assert modeling_llama.apply_rotary_pos_emb is not original
    return modeling_llama.apply_rotary_pos_emb, original


@pytest.mark.parametrize("inside", [True, False])
def test_queries_and_keys_turn_as_before(kernels, rotation, inside):
    ours, original = rotation
    q, k = torch.randn(1, 4, 7, 16), torch.randn(1, 2, 7, 16)
    cos, sin = torch.randn(2, 1, 7, 16).unbind()
    context = ForwardContext(
        torch.empty(0), Spans((), 16, torch.device("cpu")), {}, (), kernels if inside else None
    )
    with forward_context(context):
        for got, want in zip(ours(q, k, cos, sin), original(q, k, cos, sin), strict=True):
            assert torch.equal(got, want)


def test_what_is_not_ours_goes_to_the_original(rotation):
    """Outside a forward pass, in other dtypes, and with other axes: as peft and plain transformers call it."""
    ours, original = rotation
    q, k = torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16)
    cos, sin = torch.randn(2, 2, 7, 16).unbind()
    for got, want in zip(ours(q, k, cos, sin, unsqueeze_dim=2), original(q, k, cos, sin, 2), strict=True):
        assert torch.equal(got, want)


def test_the_rotation_is_installed_once(kernels, rotation):
    ours, _ = rotation
    install_compiled_rotation(make_model(), kernels.rows)
    assert modeling_llama.apply_rotary_pos_emb is ours


def test_another_rotation_is_left_alone(kernels, monkeypatch):
    def interleaved(q, k, cos, sin):
        return q * cos + q.roll(1, -1) * sin, k * cos + k.roll(1, -1) * sin

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    install_compiled_rotation(make_model(), kernels.rows)
    assert modeling_llama.apply_rotary_pos_emb is interleaved
