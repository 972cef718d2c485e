"""Who is timed: our engine without HTTP, and transformers + peft, each in a process of its own.

Each gives seconds per decode step and per prefill. A decode step's time is the median over the steps of the sequence
that began last. Knows no bounds.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import aclosing
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from server.config import Settings
from server.config_values import LoraModule
from server.engine.sequence import Sampling, Submit, Token
from server.model.linear import LoRALinear, ModuleLinear
from server.serving import Serving
from server.startup import load
from tests.bench.random_llama import Checkpoint

PROMPT = 2  # tokens before the steps that are timed: few, since nobody times them
PREFILL = 256

_contestant: Any = None  # of a process that a contestant has to itself


class Apart:
    """A contestant in a process of its own, asked as it would be here.

    OpenMP's threads wait awake between two operations only where a process has no more of them than cores. Contestants
    in one process would each find theirs asleep, 80 us an operation on one machine, which no server of one model does.
    """

    def __init__(self, kind: Callable[..., Any], *arguments: Any, **settings: Any) -> None:
        self._process = ProcessPoolExecutor(1, get_context("spawn"))
        self._process.submit(_become, kind, arguments, settings, torch.get_num_threads()).result()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._process.submit(_ask, name, arguments).result()

    def close(self) -> None:
        self._process.submit(_ask, "close", ()).result()
        self._process.shutdown()


def _become(
    kind: Callable[..., Any], arguments: tuple[Any, ...], settings: dict[str, Any], threads: int
) -> None:
    global _contestant
    torch.set_num_threads(threads)
    _contestant = kind(*arguments, **settings)


def _ask(name: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_contestant, name)(*arguments)


class Ours:
    """The engine as `loraplex serve` builds it, asked in process."""

    def __init__(self, checkpoint: Checkpoint, work: Path, adapters: int, **settings: Any) -> None:
        modules = tuple(LoraModule(path.name, path) for path in checkpoint.adapters[:adapters])
        serving = Serving()
        settled = Settings(
            model=str(checkpoint.base),
            adapter_store=work / "store",
            quantized_cache=checkpoint.base.parent / "quantized",
            lora_modules=modules,
            kv_cache_memory_bytes=1 << 30,
            **settings,
        )
        with ThreadPoolExecutor(1) as loading:  # as `serve` does: its OpenMP threads end with it
            loading.submit(load, settled, serving).result()
        assert serving.served is not None
        self._served = serving.served
        self.engine = serving.served.engine
        self._vocabulary = checkpoint.shape.vocabulary
        self._generations = [self._served.registry.entry(module.name).generation for module in modules]
        self._ids = itertools.count()
        self._draw = np.random.default_rng(0)

    def multiply_in(self, dtype: torch.dtype) -> None:
        """What bitsandbytes' products compute in from now on, where they are left to it; the rest stays in float32."""
        for module in self.engine.runner.model.modules():
            if isinstance(module, LoRALinear):
                for member in cast(ModuleLinear, module.group.base).members:
                    member.compute_dtype, member.compute_type_is_set = dtype, True

    def decode(self, adapters: Sequence[int | None], steps: int) -> float:
        """Seconds per step of a batch with these adapters, by number; None is the base alone."""
        return asyncio.run(self._decode(adapters, steps))

    def prefill(self, tokens: int = PREFILL) -> float:
        """Seconds from a prompt that was never seen to its first token, on the base alone."""
        began = time.perf_counter()
        asyncio.run(self._arrivals(None, tokens, 1))
        return time.perf_counter() - began

    def tokens_per_s(self, adapters: Sequence[int | None], tokens: int) -> float:
        """Tokens of all sequences over the time from the first's submission to the last's end."""

        async def together() -> None:
            await asyncio.gather(*(self._arrivals(adapter, PROMPT, tokens) for adapter in adapters))

        began = time.perf_counter()
        asyncio.run(together())
        return len(adapters) * tokens / (time.perf_counter() - began)

    def close(self) -> None:
        self.engine.stop()
        self._served.loader.close()
        self._served.registry.store.close()

    async def _decode(self, adapters: Sequence[int | None], steps: int) -> float:
        runs = await asyncio.gather(*(self._arrivals(adapter, PROMPT, steps) for adapter in adapters))
        last = max(
            runs, key=lambda arrivals: arrivals[0]
        )  # it decodes among all, but for a step or two at its end
        return float(statistics.median(np.diff(last)))

    async def _arrivals(self, adapter: int | None, prompt: int, tokens: int) -> list[float]:
        """When each token of one sequence came."""
        ids = tuple(int(id) for id in self._draw.integers(3, self._vocabulary, prompt))
        generation = None if adapter is None else self._generations[adapter]
        submit = Submit(f"bench-{next(self._ids)}", ids, Sampling(tokens, temperature=0), generation)
        async with aclosing(self.engine.stream(submit)) as events:
            return [time.perf_counter() async for event in events if isinstance(event, Token)]


class _Clock(StoppingCriteria):
    """Notes when each step of `generate` ended; stops nothing."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.Tensor:
        self.moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Peft:
    """transformers' `generate` over a bitsandbytes NF4 base, one adapter per row of the batch."""

    def __init__(self, checkpoint: Checkpoint, adapters: int, dtype: torch.dtype) -> None:
        quantized = next((checkpoint.base.parent / "quantized").glob("*/config.json")).parent
        base = AutoModelForCausalLM.from_pretrained(quantized, dtype=dtype)
        for parameter in base.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        self._model: Any = PeftModel.from_pretrained(base, str(checkpoint.adapters[0]), adapter_name="0")
        for number in range(1, adapters):
            self._model.load_adapter(str(checkpoint.adapters[number]), adapter_name=str(number))
        self._model.eval()
        self._vocabulary = checkpoint.shape.vocabulary
        self._draw = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def decode(self, adapters: Sequence[int], steps: int) -> float:
        """Seconds per step of a batch with these adapters, by number."""
        clock = _Clock()
        ids = torch.randint(3, self._vocabulary, (len(adapters), PROMPT), generator=self._draw)
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=[str(adapter) for adapter in adapters],
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return statistics.median(np.diff(clock.moments))

    def close(self) -> None:
        """Nothing to end: it has no threads of its own."""
