"""Who runs the decode step that is timed: our engine, our engine on bitsandbytes' kernels, transformers with peft."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from adapters.page_copy import SitePages
from server.model.context import ForwardContext
from server.model.kernel_set import Kernels
from server.model.linear import BaseLinear
from tests.bench.gpu_model import Engine
from tests.bench.gpu_timing import synchronize
from tests.bench.random_llama import RANK, TARGETS


def decode_seconds(
    engine: Engine, adapters: Sequence[int | None], context: int, steps: int, warm_up: int
) -> float:
    """Median seconds of a step from token to token, as the server's engine runs it; `context` is in the middle.

    The step is scheduled, run, drawn from and read back, and meanwhile the next one is written.
    """
    serving = engine.serving(adapters, max(2, context - warm_up - 1 - steps // 2))
    found = []
    for _ in range(1 + warm_up + steps):
        began = time.perf_counter()
        serving.step()
        found.append(time.perf_counter() - began)
    assert len(serving.scheduler.running) == len(adapters), "logits are not numbers"
    assert serving.inputs.foreseen == warm_up + steps, "a step was not written while the one before ran"
    return statistics.median(found[1 + warm_up :])


@dataclass
class Segments:
    """Which rows read which page, as a graph of the loop below is captured with."""

    rows: list[tuple[int, int, int]] = field(default_factory=list)  # start, end, page


@dataclass(frozen=True)
class LoopDeltas:
    """The deltas one adapter after the other by cuBLAS, as a server without kernels for many adapters makes them."""

    step: Segments
    pages: SitePages
    widths: tuple[int, ...]

    def product(self, base: BaseLinear, x: Tensor, group: str, context: ForwardContext) -> Tensor:
        y = base(x)
        for start, end, page in self.step.rows:
            column = 0
            for member, width in enumerate(self.widths):
                v = torch.mm(x[start:end], self.pages.a[page, member].t()) * self.pages.scale[page, member]
                y[start:end, column : column + width].addmm_(
                    v.to(x.dtype), self.pages.b[page, :, column : column + width]
                )
                column += width
        return y


def looping(kernels: Kernels, step: Segments) -> Kernels:
    """Our attention and rows, and for the rest what was there before: to be used with bitsandbytes' products."""

    def deltas(pages: SitePages, widths: tuple[int, ...]) -> LoopDeltas:
        return LoopDeltas(step, pages, widths)

    return replace(kernels, deltas=deltas)


class _Clock(StoppingCriteria):
    """Notes when each step of `generate` ended; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object) -> torch.Tensor:
        synchronize(self.device)
        self.moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def peft_seconds(model: PreTrainedModel, adapters: int, context: int, steps: int) -> float:
    """Median seconds of a decode step of `generate` with as many adapters as rows; the model becomes peft's."""
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM", init_lora_weights=False
    )
    with model.device:  # drawn there: on the host that takes longer than all that is timed
        peft_model = get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
        for number in range(1, adapters):
            peft_model.add_adapter(str(number), config, autocast_adapter_dtype=False)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    peft_model.eval()
    device = model.device
    clock = _Clock(device)
    ids = torch.randint(3, model.config.vocab_size, (adapters, context), device=device)
    peft_model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=[str(number) for number in range(adapters)],
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    gaps = [later - earlier for earlier, later in zip(clock.moments, clock.moments[1:], strict=False)]
    return statistics.median(gaps)
