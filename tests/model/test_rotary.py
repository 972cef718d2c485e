"""Rotary tables: the original's bits at every position, and no neighbour's length shows."""

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from server.model.steady import RotaryTable, install_rotary_tables
from tests.model.tiny import SIZES, make_model

LENGTH = 64
SHORT = 16  # what the scaled types were trained for
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": SHORT, "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": SHORT, "factor": 4.0, "rope_theta": 10000.0,
    },
}  # fmt: skip
STATELESS = ["default", "linear", "llama3", "yarn"]


def rotary(kind):
    longest = SHORT if kind == "dynamic" else LENGTH
    return LlamaRotaryEmbedding(
        LlamaConfig(**(SIZES | {"max_position_embeddings": longest}), rope_parameters=dict(KINDS[kind]))
    )


@pytest.mark.parametrize("kind", STATELESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_originals_bits(kind, dtype):
    x, positions = torch.zeros(1, 7, 64, dtype=dtype), torch.tensor([[5, 0, 63, 17, 17, 1, 30]])
    for got, want in zip(
        RotaryTable(rotary(kind), LENGTH)(x, positions), rotary(kind)(x, positions), strict=True
    ):
        assert got.dtype is dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_the_longest_text(kind):
    """Types that look at the batch's longest position are what they are for a text of full length."""
    x, positions = torch.zeros(1, LENGTH, 64), torch.arange(LENGTH)[None]
    for got, want in zip(
        RotaryTable(rotary(kind), LENGTH)(x, positions), rotary(kind)(x, positions), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_neighbour_changes_nothing(kind):
    table, x = RotaryTable(rotary(kind), LENGTH), torch.zeros(1, 1, 64)
    alone = table(x, torch.tensor([[3, 4]]))
    beside = table(x, torch.tensor([[3, 4, LENGTH - 1]]))
    again = table(x, torch.tensor([[3, 4]]))
    for a, b, c in zip(alone, beside, again, strict=True):
        assert torch.equal(a, b[:, :2])
        assert torch.equal(a, c)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_originals_do_let_a_long_neighbour_show(kind):
    original, x = rotary(kind), torch.zeros(1, 1, 64)
    alone = original(x, torch.tensor([[3, 4]]))
    beside = original(x, torch.tensor([[3, 4, LENGTH - 1]]))
    assert not torch.equal(alone[0], beside[0][:, :2])


def test_each_layer_type_has_a_table():
    sizes = SIZES | {"num_hidden_layers": 2}
    config = Gemma3TextConfig(**sizes, head_dim=16, layer_types=["sliding_attention", "full_attention"])
    table, x = RotaryTable(Gemma3RotaryEmbedding(config), LENGTH), torch.zeros(1, 1, 64)
    positions = torch.tensor([[3, 9]])
    kinds = ["sliding_attention", "full_attention"]
    got = {kind: table(x, positions, kind) for kind in kinds}
    for kind in kinds:
        assert torch.equal(got[kind][0], Gemma3RotaryEmbedding(config)(x, positions, kind)[0])
    assert not torch.equal(got[kinds[0]][0], got[kinds[1]][0])


def test_every_rotary_of_a_model_is_replaced_once():
    model = make_model()
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    assert install_rotary_tables(model, LENGTH) == 1
    assert isinstance(model.model.rotary_emb, RotaryTable)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert install_rotary_tables(nn.Sequential(nn.Linear(2, 2)), LENGTH) == 0
