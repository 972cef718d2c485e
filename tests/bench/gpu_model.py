"""A Llama of the size people serve, made on the device with random weights, and what our engine needs around it.

NF4 codes are drawn as bytes: nothing is quantized, and speed does not depend on what weights say. Knows nothing of who
is timed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapters.pool import Pool
from kernels.lookup import NF4_CODE
from server.engine.batch import build
from server.engine.blocks import Blocks
from server.engine.engine import Engine as Serving
from server.engine.scheduler import Limits, Scheduled, Scheduler
from server.engine.sequence import Sampling
from server.engine.sequence import Sequence as Running
from server.model.device_runner import DeviceRunner
from server.model.kernel_set import Kernels
from server.model.kv_cache import KVCache
from server.model.runner import StepInputs
from server.model.servable import LinearBackend, ServableModel, make_servable
from server.model.step_tables import StepLayout
from tests.bench.random_llama import Shape, llama_config

BLOCK = 16
GROWTH = 2 * BLOCK  # positions that the engine's sequences may grow by, each
LLAMA_8B = Shape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=128_256)
TINY = Shape(layers=1, hidden=64, intermediate=128, heads=4, kv_heads=2, vocabulary=96)


def nf4_linear(inside: int, out: int, device: torch.device) -> Linear4bit:
    """A linear as bitsandbytes holds it, of random codes."""
    linear = Linear4bit(
        inside, out, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    packed = torch.randint(0, 256, (inside * out // 2, 1), dtype=torch.uint8, device=device)
    absmax = torch.rand(inside * out // 64, device=device) * 0.02 + 0.01
    code = torch.tensor(NF4_CODE, dtype=torch.float32, device=device)
    state = QuantState(
        absmax, torch.Size((out, inside)), code, blocksize=64, quant_type="nf4", dtype=torch.bfloat16
    )
    linear.weight = Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=64, compress_statistics=False,
        quant_type="nf4", module=linear, bnb_quantized=True,
    )  # fmt: skip
    linear.quant_state = state
    return linear.eval()


def random_llama(shape: Shape, device: torch.device, attention: str = "eager") -> PreTrainedModel:
    """The whole model on the device; its linears in NF4, the rest in bfloat16."""
    config = llama_config(
        shape, max_position_embeddings=8192, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    head = model.get_output_embeddings()
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    for path, module in linears:
        model.set_submodule(path, nf4_linear(module.in_features, module.out_features, device))
    model.eval().requires_grad_(False)
    made: PreTrainedModel = model
    return made


@dataclass(frozen=True)
class Pages:
    """Adapter number k has page k of every group: what the engine asks of a residency."""

    groups: tuple[str, ...]

    def pages(self, generation: str | None) -> dict[str, tuple[int, ...]]:
        return {} if generation is None else dict.fromkeys(self.groups, (int(generation),))

    def line_up(self, generations: Iterable[str | None]) -> None:
        assert not list(generations), "all adapters are there"


class Engine:
    """A servable model with a pool of random adapters, a cache and a runner: a step without scheduling or threads."""

    def __init__(
        self,
        model: PreTrainedModel,
        kernels: Kernels,
        *,
        adapters: int,
        positions: int,  # of the cache
        buckets: Iterable[int],
        prompts: Iterable[int] = (),  # rows of steps that read prompts and are captured too
        fixed: bool = False,
        backend: LinearBackend = "exact",
    ) -> None:
        self.servable: ServableModel = make_servable(model, kernels=kernels, backend=backend)
        groups = self.servable.layout.groups
        device, dtype = self.servable.device, self.servable.dtype
        self.pool = Pool(self.servable.layout, dict.fromkeys(groups, adapters), dtype, device)
        for site in self.pool.sites:
            site.a.normal_(0, 0.02)
            site.b.normal_(0, 0.02)
            site.scale.fill_(1.0)
        self.servable.attach(self.pool.sites)
        self.pages = Pages(tuple(groups))
        self.cache = KVCache.allocate(
            self.servable.attention,
            blocks=positions // BLOCK + 1,
            block_size=BLOCK,
            dtype=dtype,
            device=device,
        )
        for k, v in self.cache.layers:
            k.normal_()
            v.normal_()
        sizes = [(rows, None) for rows in buckets] + [(rows, 1) for rows in prompts]
        layouts = [self._layout(*size, fixed, pages) for size in sizes for pages in (0, 1)]
        self.runner = DeviceRunner(self.servable, self.cache, layouts=layouts, fixed=fixed)
        self.runner.capture(lambda done, total: None)

    def _layout(self, rows: int, wanted: int | None, fixed: bool, pages: int) -> StepLayout:
        """Of the engine's own graphs, those for a bucket and adapters of so many pages."""
        return StepLayout.bucket(
            rows,
            wanted,
            groups=self.pages.groups,
            pages=pages,
            most_blocks=max(rows, self.cache.blocks),
            block_size=BLOCK,
            heads=self.servable.heads,
            fixed=fixed,
        )

    def sequences(self, adapters: Sequence[int | None], context: int) -> list[Scheduled]:
        """One decode each at the end of `context` tokens, in row order, each with blocks of its own."""
        each = -(-context // BLOCK)
        assert len(adapters) * each < self.cache.blocks, "the cache is too small for so many sequences"
        draw = np.random.default_rng(0)
        batch = []
        for number, adapter in enumerate(sorted(adapters, key=lambda a: -1 if a is None else a)):
            tokens = draw.integers(3, self.servable.vocab_size, context).tolist()
            blocks = array("i", range(1 + number * each, 1 + (number + 1) * each))
            generation = None if adapter is None else str(adapter)
            running = Running(f"s{number}", context, Sampling(64, temperature=0), generation, tokens)
            running.blocks, running.computed = blocks, context - 1
            batch.append(Scheduled(running, 1))
        return batch

    def inputs(self, batch: list[Scheduled]) -> StepInputs:
        return build(batch, self.pages, BLOCK)  # type: ignore[arg-type]

    def serving(self, adapters: Sequence[int | None], context: int) -> Serving:
        """The server's engine in the middle of its work: one sequence each that decodes. Nobody listens to them."""
        batch = self.sequences(adapters, context)
        limits = Limits(len(batch), tokens=len(batch), prefill_chunk=BLOCK, block_size=BLOCK)
        scheduler = Scheduler(limits, Blocks(self.cache.blocks), self.pages)  # type: ignore[arg-type]
        for item in batch:
            item.sequence.blocks = array("i")
            assert scheduler.blocks.extend(item.sequence.blocks, -(-context // BLOCK))
            scheduler.running.append(item.sequence)
        return Serving(self.runner, scheduler, max_queued=0)  # type: ignore[arg-type]

    def prompt(self, adapter: int | None, tokens: int) -> StepInputs:
        """A prompt read whole, in one step, its last row's logits wanted."""
        (item,) = self.sequences([adapter], tokens)
        item.sequence.computed = 0
        return self.inputs([Scheduled(item.sequence, tokens)])


def logits_are_numbers(logits: Tensor) -> bool:
    return bool(torch.isfinite(logits).all())
