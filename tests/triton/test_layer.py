"""A decoder layer as one function over the kernels answers as it does module by module; others are left alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, MistralConfig, Qwen2Config, Qwen3Config

from kernels import rows
from kernels.segments import Segment, Span
from server.model.compiled_layer import _alike
from server.model.cuda import cuda_kernels
from server.model.kernel_set import plain
from server.model.runner import Runner, StepInputs
from server.model.steady import CompiledLayer
from tests.model.tiny import SIZES, make_model
from tests.triton.test_server import (
    BLOCK,
    CPU,
    cache_of,
    cuda,  # noqa: F401
    decodes,
    device_runner,
    prompts,
    servable_of,
)

ONE_LAYER = SIZES | {"num_hidden_layers": 1, "intermediate_size": 64}
LENGTHS = [2, 5, 1]
CONFIGS = {
    "llama": None,
    "qwen2": lambda: Qwen2Config(**ONE_LAYER),  # with biases
    "mistral": lambda: MistralConfig(sliding_window=3, **ONE_LAYER),
    "qwen3": lambda: Qwen3Config(head_dim=16, **ONE_LAYER),
    "gemma2": lambda: Gemma2Config(head_dim=16, **ONE_LAYER),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Says where each architecture's base lies, its biases and norms with numbers of their own."""

    def made(architecture):
        path = tmp_path_factory.getbasetemp() / f"layer-{architecture}"
        if not path.exists():
            torch.manual_seed(0)
            make = CONFIGS[architecture]
            model = make_model(make and make(), **(ONE_LAYER if make is None else {}))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias") or "norm" in name:
                        parameter += torch.randn_like(parameter) / 3
            model.save_pretrained(path)
        return path

    return made


def taken_over(servable):
    return [m for m in servable.model.modules() if isinstance(m.__dict__.get("forward"), CompiledLayer)]


def mixed(groups):
    """After `prompts` of LENGTHS: three more tokens of the first text, one more of the others, adapters as there."""
    after, more = decodes(LENGTHS, groups), 2
    repeats = [1 + more] + [1] * (len(LENGTHS) - 1)
    ids, at, kv = (np.repeat(of, repeats) for of in (after.token_ids, after.positions, after.kv_index))
    for rows_of in (at, kv):
        rows_of[: 1 + more] += np.arange(1 + more)
    first, *others = after.spans
    spans = (
        Span(0, 1 + more, first.kv_length + more, first.blocks),
        *(Span(s.start + more, s.end + more, s.kv_length, s.blocks) for s in others),
    )
    segments = tuple(
        Segment(s.start + more, s.end + more, s.pages, s.weights) for s in after.segments[groups[0]]
    )
    return StepInputs(ids, at, kv, np.arange(len(ids)), spans, dict.fromkeys(groups, segments))


@pytest.mark.parametrize(
    ("architecture", "how", "fixed"),
    [
        ("llama", "nf4", False),
        ("llama", "nf4-bf16", False),
        ("llama", "nf4-bf16", True),
        ("llama", "bf16", False),  # products of plain PyTorch
        ("qwen2", "nf4-bf16", False),
        ("mistral", "nf4-bf16", False),
    ],
)
def test_as_one_function_or_module_by_module(folder, cuda, monkeypatch, architecture, how, fixed):  # noqa: F811
    servable = servable_of(folder(architecture), cuda_kernels(CPU, fixed=fixed), how)
    groups = list(servable.layout.groups)
    (layer,) = taken_over(servable)
    written = []
    monkeypatch.setattr(
        rows,
        "rotate_and_write",
        lambda *given, whole=rows.rotate_and_write: written.append(1) or whole(*given),
    )
    whole = device_runner(servable, fixed=fixed)
    steps = (prompts(LENGTHS, groups), mixed(groups))
    got = [whole.forward(step) for step in steps]
    assert len(written) == 2
    del layer.forward
    apart = device_runner(servable, fixed=fixed)
    epsilon = torch.finfo(servable.dtype).eps
    for logits, step in zip(got, steps, strict=True):
        assert _alike(logits, apart.forward(step), epsilon)
    assert len(written) == 2
    for ours, theirs in zip(whole.cache.layers[0], apart.cache.layers[0], strict=True):
        assert _alike(ours[BLOCK:], theirs[BLOCK:], epsilon)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_a_layer_of_other_parts_is_left_alone_and_answers(folder, cuda, architecture):  # noqa: F811
    ours = servable_of(folder(architecture), cuda_kernels(CPU, fixed=False))
    assert taken_over(ours) == []
    reference = servable_of(folder(architecture), plain())
    step = prompts(LENGTHS, list(ours.layout.groups))
    want = Runner(reference, cache_of(reference)).forward(step)
    torch.testing.assert_close(device_runner(ours).forward(step), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 1.02])
@pytest.mark.parametrize("how", ["nf4", "nf4-bf16"])
def test_a_layer_that_does_a_little_more_is_left_alone(folder, cuda, monkeypatch, factor, how):  # noqa: F811
    """The parts are the usual ones, what it does with them is not."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    usual = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda *given, **others: usual(*given, **others) * factor
    )
    servable = servable_of(folder("llama"), cuda_kernels(CPU, fixed=False), how)
    assert len(taken_over(servable)) == (factor == 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_alike_is_said_in_the_dtypes_own_terms(dtype):
    want = torch.randn(3, 64).to(dtype)
    epsilon = torch.finfo(dtype).eps
    nearest = torch.nextafter(want, torch.full_like(want, torch.inf))
    assert _alike(want, want, 0.0)
    assert not _alike(nearest, want, 0.0)
    assert _alike(nearest, want, epsilon)
    assert not _alike(want * (1 + 4 * epsilon), want, epsilon)
    assert not _alike(torch.full_like(want, torch.nan), want, epsilon)


def test_kernels_that_run_no_layer_whole_take_none_over(folder, cuda):  # noqa: F811
    apart = replace(cuda_kernels(CPU, fixed=False), layers=None)
    assert taken_over(servable_of(folder("llama"), apart)) == []
