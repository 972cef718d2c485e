"""A layer in one call gives the bits that it gives module by module; only layers of the usual parts are run so."""

import copy

import pytest
import torch

from server.model.kernel_set import compiled
from server.model.servable import make_servable
from server.model.steady import CompiledLayer
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
    for layer in layers:
        del layer.forward
    one_by_one = Harness(servable, adapters, chunk=16).run(ROWS, {"rank3": 2})
    for name in ROWS:
        assert_same_bits(in_one_call[name], one_by_one[name])


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
