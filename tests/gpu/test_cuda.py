"""The engine on CUDA: what the CPU proves must hold there too, for the reference operations and for the kernels."""

import asyncio
import json
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.segments import KV_TILE, Segment, Span, Spans
from tests.engine.fakes import sampled, sequence
from tests.equivalence.case import Case, assert_as_good_as_peft, assert_exact
from tests.equivalence.models import CONFIGS
from tests.gpu.demo_engine import demo_engine

DEMO = Path(__file__).parents[2] / "demo"


def on_both(operation, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return operation(*tensors), operation(*(tensor.cuda() for tensor in tensors)).cpu()


def test_shrink_and_expand_equal_the_cpus():
    segment = Segment(3, 24, (4, 1), (1.0, 0.5))
    x, a, scale = torch.randn(30, 128), torch.randn(6, 2, 16, 128), torch.rand(6, 2)
    b = torch.randn(6, 16, 192)

    def delta(x, a, scale, b):
        y = torch.zeros(30, 192, device=x.device)
        reference.expand(y, reference.shrink(x, a, scale, segment), b, (128, 64), segment)
        return y

    cpu, cuda = on_both(delta, x, a, scale, b)
    torch.testing.assert_close(cuda, cpu, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("window", [None, 40])
def test_attention_equals_the_cpus(window):
    span = Span(0, 5, 300, tuple(range(3, 22)))
    q, k, v = torch.randn(5, 4, 64), torch.randn(KV_TILE * 3, 2, 64), torch.randn(KV_TILE * 3, 2, 64)

    def attend(q, k, v):
        spans = Spans((span,), 16, q.device)
        return reference.attention(q, k, v, spans, scale=0.1, window=window, softcap=20.0, sinks=None)

    cpu, cuda = on_both(attend, q, k, v)
    torch.testing.assert_close(cuda, cpu, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("how", ["fp32", "nf4"])
def test_exact_paths_agree_with_peft(architecture, how, tmp_path):
    assert_exact(Case(architecture, how, tmp_path, device="cuda"))


@pytest.mark.parametrize(
    ("how", "backend"), [("bf16", "exact"), ("nf4-bf16", "exact"), ("nf4-bf16", "bitsandbytes")]
)
def test_rounding_paths_are_as_good_as_pefts(how, backend, tmp_path):
    assert_as_good_as_peft(Case("llama", how, tmp_path, backend=backend, device="cuda"))


def test_the_demos_story(tmp_path):
    """The demo's base in NF4 and its adapters, all scenes at once through the engine."""
    scenes = json.loads((DEMO / "story.json").read_text())
    engine, ask = demo_engine(tmp_path, "cuda")
    lines = [(scene, line) for scene in scenes for line in scene["lines"]]

    async def all_at_once() -> list[str]:
        return await asyncio.gather(
            *(ask(scene["prompt"], line["adapter"], scene["max_tokens"]) for scene, line in lines)
        )

    engine.start()
    try:
        answers = asyncio.run(all_at_once())
    finally:
        engine.stop()
    for answer, (_, line) in zip(answers, lines, strict=True):
        assert line["must_contain"] in answer, line["adapter"]
    engine.check()


def test_adapters_come_and_go_while_others_decode(tmp_path):
    """Room for one adapter: each is copied in again and again, beside a stream of the base's own, whose bits stay."""
    engine, ask = demo_engine(tmp_path, "cuda", pages=1, fixed=True)
    scenes = json.loads((DEMO / "story.json").read_text())
    lines = [(scene, line) for scene in scenes for line in scene["lines"]]

    async def one_after_the_other() -> list[str]:
        return [await ask(scene["prompt"], line["adapter"], scene["max_tokens"]) for scene, line in lines]

    async def beside_the_base(rounds: int) -> tuple[list[list[str]], list[str]]:
        longest = asyncio.create_task(_again(ask, 20))
        found = [await one_after_the_other() for _ in range(rounds)]
        return found, await longest

    engine.start()
    try:
        alone = asyncio.run(one_after_the_other())
        among, bases = asyncio.run(beside_the_base(3))
    finally:
        engine.stop()
    for answer, (_, line) in zip(alone, lines, strict=True):
        assert line["must_contain"] in answer, line["adapter"]
    assert all(answers == alone for answers in among), "an adapter's text changed beside the base"
    assert len(set(bases)) == 1, "the base's own text changed with what was loaded beside it"
    assert engine.residency.pool.evictions > 0
    engine.check()


async def _again(ask, times: int) -> list[str]:
    return [await ask("Q: What is discharge?\nA:", None, 40) for _ in range(times)]


def test_a_draw_sums_nothing_in_an_order_that_varies():
    """torch refuses what it lists as not deterministic, such as a running sum of floats."""
    logits = torch.randn(6, 50_000)
    asked = [sequence(seed=seed, temperature=1.0, top_p=0.9, min_p=1e-6, top_k=40_000) for seed in range(6)]
    torch.use_deterministic_algorithms(True)
    try:
        assert sampled(logits.cuda(), asked) == sampled(logits, asked)
    finally:
        torch.use_deterministic_algorithms(False)
