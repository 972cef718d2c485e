"""Our paged attention and torch's `varlen_attn` with a block table, on the same queries, keys and blocks.

Each walks over copies of the cache that no L2 holds, in a CUDA graph. Knows no bounds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention import attention
from kernels.plans import AttentionPlan
from kernels.segments import Span
from kernels.workspace import Workspace
from tests.bench.gpu_timing import captured, copies_of, rotating
from tests.bench.random_llama import Shape

BLOCK = 16


@dataclass(frozen=True)
class Case:
    """So many sequences of `keys` positions, whose last `queries` are asked about."""

    sequences: int
    queries: int
    keys: int


@torch.inference_mode()
def attention_seconds(shape: Shape, case: Case, device: torch.device) -> tuple[float, float | str]:
    """Seconds of ours and of torch's; in place of torch's, why there is none."""
    work = _Work(shape, case, device)
    ours = work.seconds(work.ours)
    try:
        theirs = work.theirs(0)
    except Exception as error:
        return ours, f"{type(error).__name__}: {error}"[:200]
    wanted = work.ours(0).float()
    difference = float((theirs.float() - wanted).norm() / wanted.norm())
    assert difference < 0.02, f"the two differ by {difference}"
    return ours, work.seconds(work.theirs)


class _Work:
    def __init__(self, shape: Shape, case: Case, device: torch.device) -> None:
        width = shape.hidden // shape.heads
        each = -(-case.keys // BLOCK)
        positions = (case.sequences * each + 1) * BLOCK
        rows = case.sequences * case.queries
        self.case, self.device = case, device
        nbytes = positions * shape.kv_heads * width * 4
        self.copies = copies_of(nbytes) if device.type == "cuda" else 1
        size = (self.copies, 2, positions, shape.kv_heads, width)
        self.caches = torch.randn(size, device=device, dtype=torch.bfloat16)
        self.q = torch.randn(rows, shape.heads, width, device=device, dtype=torch.bfloat16)
        self.scale, self.workspace = width**-0.5, Workspace(device)
        blocks = torch.arange(1, case.sequences * each + 1, dtype=torch.int32).view(case.sequences, each)
        self.plan = self._plan(shape.heads // shape.kv_heads, blocks)
        self.table = blocks.to(device)
        self.used = torch.full((case.sequences,), case.keys, dtype=torch.int32, device=device)
        self.starts = torch.arange(0, rows + 1, case.queries, dtype=torch.int32, device=device)

    def _plan(self, group: int, table: Tensor) -> AttentionPlan:
        count = self.case.queries
        spans = [
            Span(number * count, (number + 1) * count, self.case.keys, tuple(blocks))
            for number, blocks in enumerate(table.tolist())
        ]
        queries = AttentionPlan.tile_queries(group, count)
        host = np.zeros(AttentionPlan.sizes(len(self.q), table.numel()), np.int32)
        _, tiles, lines = AttentionPlan.fill(host, spans, len(self.q), queries)
        buffer = torch.from_numpy(host).to(self.device)
        return AttentionPlan.view(buffer, len(self.q), queries, BLOCK, tiles=tiles, lines=lines)

    def ours(self, copy: int) -> Tensor:
        k, v = self.caches[copy]
        return attention(
            self.q, k, v, self.plan, self.workspace, scale=self.scale, window=None, softcap=None, sinks=None
        )

    def theirs(self, copy: int) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        k, v = (cache.unflatten(0, (-1, BLOCK)) for cache in self.caches[copy])
        asked = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        found = varlen_attn(  # torch 2.11 has the block table, and no word for heads that share keys
            self.q, k, v, self.starts, None, self.case.queries, self.case.keys, scale=self.scale,
            window_size=(-1, 0), seqused_k=self.used, block_table=self.table, **asked,
        )  # fmt: skip
        assert isinstance(found, Tensor)
        return found

    def seconds(self, work: Callable[[int], Tensor]) -> float:
        return captured(rotating(work, self.copies), self.device) / self.copies
