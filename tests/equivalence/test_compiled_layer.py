"""A layer in one call gives the bits that it gives module by module; only layers of the usual parts are run so."""

import copy

import pytest
import torch

from server.model.compiled_layer import TRIAL_ROWS, trial_context
from server.model.context import forward_context
from server.model.kernel_set import compiled
from server.model.servable import make_servable
from server.model.steady import CompiledLayer, LayerStack
from tests.equivalence.harness import Harness, Row, read_peft
from tests.equivalence.models import VOCAB, held_model, plain_model, with_adapters
from tests.equivalence.test_invariance import assert_same_bits, kernel_library

LAYERS = 3
TAKEN = {"llama": LAYERS, "qwen2": LAYERS, "mistral": LAYERS, "qwen3": 0, "gemma2": 0, "phi3": 0}


def tokens(seed: int, length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = {
    "base": Row(tokens(1, 90), 70, None),
    "rank3": Row(tokens(2, 61), 50, "rank3"),  # on two linears only
    "rank64": Row(tokens(3, 30), 7, "rank64"),
}


def compiled_layers(servable):
    return [m for m in servable.model.modules() if isinstance(m.__dict__.get("forward"), CompiledLayer)]


def servable_of(architecture, how, kernels, folder):
    plain = plain_model(architecture)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += torch.randn_like(parameter) / 3
    plain.save_pretrained(folder / "base")
    servable = make_servable(held_model(folder / "base", how), kernels=compiled(kernel_library(kernels)))
    return servable, read_peft(
        with_adapters(copy.deepcopy(plain), architecture), folder / "adapters", servable
    )


@pytest.mark.parametrize("architecture", TAKEN)
def test_layers_of_the_usual_parts_are_taken_over(architecture, tmp_path):
    servable, _ = servable_of(architecture, "fp32", "compiled", tmp_path)
    assert len(compiled_layers(servable)) == TAKEN[architecture]
    assert isinstance(servable.model.model.layers, LayerStack) == (TAKEN[architecture] > 0)


@pytest.mark.parametrize(
    ("architecture", "held", "kernels"),
    [
        *(("llama", "nf4", kernels) for kernels in ("avx512", "avx2", "portable")),
        ("qwen2", "nf4", "compiled"),  # with biases
        ("mistral", "fp32", "compiled"),  # with a window
    ],
)
def test_in_one_call_or_module_by_module(architecture, held, kernels, tmp_path):
    servable, adapters = servable_of(architecture, held, kernels, tmp_path)
    layers = compiled_layers(servable)
    assert len(layers) == LAYERS
    in_one_call = Harness(servable, adapters, chunk=16).run(ROWS, {"rank3": 2})
    servable.model.model.layers = torch.nn.ModuleList(layers)
    for layer in layers:
        del layer.forward
    one_by_one = Harness(servable, adapters, chunk=16).run(ROWS, {"rank3": 2})
    for name in ROWS:
        assert_same_bits(in_one_call[name], one_by_one[name])


def test_what_is_done_between_layers_is_done(tmp_path):
    """Each layer can be run whole and is; all of them in one call would leave something out."""
    plain_model("llama").save_pretrained(tmp_path)
    model = held_model(tmp_path, "fp32")
    model.model.layers[1].register_forward_hook(lambda layer, given, x: x * 1.5)
    servable = make_servable(model, kernels=compiled(kernel_library("compiled")))
    assert len(compiled_layers(servable)) == LAYERS
    assert not isinstance(servable.model.model.layers, LayerStack)


@torch.inference_mode()
def test_in_place_of_one_call_every_layer_runs_its_own(tmp_path):
    servable, _ = servable_of("llama", "fp32", "compiled", tmp_path)
    layers = servable.model.model.layers
    (first,) = layers
    parts = [layer.forward.parts for layer in layers.children()]
    x = want = torch.randn(1, TRIAL_ROWS, 256)
    angles = torch.randn(2, 1, TRIAL_ROWS, 64).unbind()
    with forward_context(trial_context(parts, servable.kernels, x.device, x.dtype)):
        for layer in layers.children():
            want = type(layer).forward(layer, want, position_embeddings=angles)
        assert torch.equal(first.forward.original(x, position_embeddings=angles), want)
        assert torch.equal(first(x, position_embeddings=angles), want)


def test_another_pool_and_cache_are_found(tmp_path):
    """What a layer knows by address is found again when a servable is given other memory."""
    servable, adapters = servable_of("llama", "nf4", "compiled", tmp_path)
    first = Harness(servable, adapters)
    want = first.run(ROWS)
    second = Harness(servable, adapters, adapter_dtype=torch.float32, blocks=50)
    del first
    for name, logits in second.run(ROWS).items():
        assert_same_bits(logits, want[name])


def test_a_layer_that_multiplies_its_residual_is_left_alone(tmp_path, monkeypatch):
    """The parts are the usual ones, what it does with them is not (Granite)."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    usual = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, x, **others: usual(self, x, **others) * 1.5
    )
    servable, _ = servable_of("llama", "fp32", "compiled", tmp_path)
    assert compiled_layers(servable) == []
