"""The KV cache's tensors, and a step: rows in, the wanted logits out."""

import numpy as np
import pytest
import torch

from kernels.reference import ROW_TILE
from kernels.segments import KV_TILE, Span
from server.model.attention import AttentionLayer
from server.model.kv_cache import PADDING_BLOCK, KVCache, position_nbytes
from server.model.runner import Runner, StepInputs
from server.model.servable import make_servable
from tests.model.tiny import make_model

CPU = torch.device("cpu")
LAYERS = (
    AttentionLayer(2, 16, 8, None, frozenset(), False),
    AttentionLayer(1, 4, 4, 32, frozenset(), False),
)


def test_the_cache_is_zeros_of_each_layers_shape():
    cache = KVCache.allocate(LAYERS, blocks=5, block_size=16, dtype=torch.bfloat16, device=CPU)
    positions = 5 * 16 + KV_TILE
    shapes = [(tuple(k.shape), tuple(v.shape)) for k, v in cache.layers]
    assert shapes == [((positions, 2, 16), (positions, 2, 8)), ((positions, 1, 4), (positions, 1, 4))]
    assert all(part.dtype is torch.bfloat16 and not part.any() for layer in cache.layers for part in layer)


def test_the_bytes_of_a_position():
    assert position_nbytes(LAYERS, torch.float32) == (2 * 24 + 8) * 4
    assert position_nbytes(LAYERS, torch.bfloat16) == (2 * 24 + 8) * 2


def test_a_block_size_must_divide_the_tile():
    with pytest.raises(AssertionError, match="block size 24"):
        KVCache.allocate(LAYERS, blocks=5, block_size=24, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model()


@pytest.fixture
def runner(model):
    """A fresh cache over the same servable model."""
    if not hasattr(model, "servable"):
        object.__setattr__(model, "plain", make_model())
        model.plain.load_state_dict(model.state_dict())
        object.__setattr__(model, "servable", make_servable(model))
    cache = KVCache.allocate(
        model.servable.attention, blocks=6, block_size=16, dtype=torch.float32, device=CPU
    )
    return Runner(model.servable, cache)


def step(tokens, wanted, block=2, start=0):
    at = np.arange(start, start + len(tokens))
    return StepInputs(
        np.asarray(tokens), at, at + block * 16, np.asarray(wanted, dtype=np.int64),
        (Span(0, len(tokens), start + len(tokens), (block,)),), {},
    )  # fmt: skip


TEXT = [5, 9, 33, 2, 60, 7, 7]


@torch.inference_mode()
def test_logits_are_the_models(runner, model):
    got = runner.forward(step(TEXT, [6, 0, 3]))
    want = model.plain(input_ids=torch.tensor([TEXT])).logits[0, [6, 0, 3]]
    assert got.dtype is torch.float32
    assert torch.allclose(got, want, atol=1e-5)


def test_the_cache_carries_what_came_before(runner):
    whole = runner.forward(step(TEXT, [6]))
    runner.forward(step(TEXT[:4], []))
    runner.forward(step(TEXT[4:6], [], start=4))
    assert torch.equal(runner.forward(step(TEXT[6:], [0], start=6)), whole)


def test_no_logits_are_made_when_none_are_wanted(runner):
    seen = []
    head = runner.model.lm_head
    hook = head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    try:
        assert runner.forward(step(TEXT, [])).shape == (0, 64)
        assert runner.forward(step(TEXT, [6])).shape == (1, 64)
    finally:
        hook.remove()
    assert seen == [0, ROW_TILE]


def test_rows_are_padded_and_the_padding_writes_to_its_own_block(runner):
    seen = []
    body = runner.model.model
    for keys, _ in runner.cache.layers:
        keys.fill_(7)
    hook = body.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[1]))
    try:
        runner.forward(step(TEXT, [6]))
    finally:
        hook.remove()
    assert seen == [ROW_TILE]
    written = {
        place
        for k, _ in runner.cache.layers
        for place in k.flatten(1).ne(7).any(dim=1).nonzero().flatten().tolist()
    }
    assert written == {PADDING_BLOCK * 16, *range(32, 32 + len(TEXT))}


def test_a_step_that_fails_leaves_no_context(runner):
    bad = step([5, 99], [1])
    with pytest.raises(IndexError):
        runner.forward(bad)
    assert runner.forward(step(TEXT, [6])).shape == (1, 64)
