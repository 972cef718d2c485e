"""Our engine's parts on given sequences with given continuations: every step's logits, without sampling or threads."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.loader import Loader
from adapters.pages import plan_pages
from adapters.peft_format import read_adapter
from adapters.pool import Pool
from server.engine import batch as batches
from server.engine.blocks import Blocks
from server.engine.scheduler import Limits, Residency, Scheduler
from server.engine.sequence import Sampling, Sequence
from server.model.device_runner import DeviceRunner
from server.model.kv_cache import KVCache
from server.model.runner import Runner
from server.model.servable import ServableModel


@dataclass(frozen=True)
class Row:
    """One sequence: its whole text, how much of it is prompt, and its adapter."""

    tokens: list[int]
    prompt: int
    adapter: str | None = None


def read_peft(peft_model: torch.nn.Module, folder: Path, servable: ServableModel) -> dict[str, Adapter]:
    """peft's own files of every adapter, read as an upload would be."""
    peft_model.save_pretrained(folder)
    return {
        name: read_adapter(folder / name, name, servable.layout, torch.float32, max_rank=64)
        for name in peft_model.peft_config
    }


class Harness:
    """A scheduler, a pool and a runner over a servable model."""

    def __init__(
        self,
        servable: ServableModel,
        adapters: dict[str, Adapter],
        *,
        tokens: int = 64,
        chunk: int = 32,
        blocks: int = 96,
        pool_bytes: int = 32 << 20,
        device: str = "cpu",
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.pool = Pool(
            servable.layout, plan_pages(servable.layout, adapter_dtype, pool_bytes), adapter_dtype, device
        )
        servable.attach(self.pool.sites)
        cache = KVCache.allocate(
            servable.attention,
            blocks=blocks,
            block_size=16,
            dtype=servable.dtype,
            device=torch.device(device),
        )
        self.runner = DeviceRunner(servable, cache) if servable.kernels.planned else Runner(servable, cache)
        self.loader = Loader(adapters.__getitem__, 1 << 30, lambda: None)
        self.residency = Residency(self.loader, self.pool)
        self.scheduler = Scheduler(Limits(16, tokens, chunk, 16), Blocks(blocks), self.residency)

    def run(
        self, rows: dict[str, Row], arrivals: dict[str, int] | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """Logits by row and by position of the token they were computed from.

        `arrivals` gives the step at which a row joins; the others are there from the start.
        """
        found: dict[str, dict[int, Tensor]] = {name: {} for name in rows}
        late = dict(arrivals or {})
        for name in rows:
            if name not in late:
                self._add(name, rows[name])
        step = 0
        while late or self.scheduler.running or self.scheduler.waiting:
            for name in [name for name, at in late.items() if at <= step]:
                self._add(name, rows[name])
                del late[name]
            self._step(rows, found)
            step += 1
            assert step < 10_000, "the schedule does not come to an end"
        self.pool.check()
        return found

    def _add(self, name: str, row: Row) -> None:
        sampling = Sampling(max_tokens=len(row.tokens), temperature=0)
        self.scheduler.add(Sequence(name, row.prompt, sampling, row.adapter, list(row.tokens[: row.prompt])))

    def _step(self, rows: dict[str, Row], found: dict[str, dict[int, Tensor]]) -> None:
        batch = batches.in_row_order(self.scheduler.schedule())
        self.scheduler.check()
        assert not self.scheduler.rejected
        if not batch:
            return
        logits = self.runner.forward(batches.build(batch, self.residency, 16))
        sampled = [item.sequence for item in batch if item.samples]
        for item in batch:
            item.sequence.computed += item.count
        for sequence, row in zip(sampled, logits, strict=True):
            name = sequence.request_id
            found[name][len(sequence.tokens) - 1] = row.clone()
            if len(sequence.tokens) < len(rows[name].tokens):
                sequence.tokens.append(rows[name].tokens[len(sequence.tokens)])
            else:
                self.scheduler.retire(sequence)
