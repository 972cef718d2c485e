"""Our paged attention and torch's `varlen_attn` with a block table, on the same queries, keys and blocks.

Each walks over copies of the cache that no L2 holds, in a CUDA graph. Knows no bounds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kernels.attention import attention
from kernels.plans import AttentionPlan, Heads
from kernels.segments import Span
from kernels.workspace import Workspace
from tests.bench.gpu_timing import captured, copies_of, rotating
from tests.bench.random_llama import Shape

BLOCK = 16


@dataclass(frozen=True)
class Case:
    """So many sequences of `keys` positions, whose last `queries` are asked about; the last may be a longer one."""

    sequences: int
    queries: int
    keys: int
    longest: int = 0

    @property
    def lengths(self) -> list[int]:
        return [self.keys] * (self.sequences - 1) + [max(self.keys, self.longest)]

    def __str__(self) -> str:
        longer = f"+{self.longest}" if self.longest else ""
        return f"{self.sequences}x{self.queries}/{self.keys}{longer}"


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
        needed = [-(-keys // BLOCK) for keys in case.lengths]
        positions = (sum(needed) + 1) * BLOCK
        rows = case.sequences * case.queries
        self.case, self.device = case, device
        nbytes = positions * shape.kv_heads * width * 4
        self.copies = copies_of(nbytes) if device.type == "cuda" else 1
        size = (self.copies, 2, positions, shape.kv_heads, width)
        self.caches = torch.randn(size, device=device, dtype=torch.bfloat16)
        self.q = torch.randn(rows, shape.heads, width, device=device, dtype=torch.bfloat16)
        self.scale, self.workspace = width**-0.5, Workspace(device)
        blocks = torch.arange(1, sum(needed) + 1, dtype=torch.int32).split(needed)
        self.plan = self._plan(Heads(shape.heads // shape.kv_heads, shape.kv_heads), blocks)
        self.table = pad_sequence(list(blocks), batch_first=True).to(device)
        self.used = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        self.starts = torch.arange(0, rows + 1, case.queries, dtype=torch.int32, device=device)

    def _plan(self, heads: Heads, tables: Sequence[Tensor]) -> AttentionPlan:
        count = self.case.queries
        spans = [
            Span(number * count, (number + 1) * count, keys, tuple(blocks.tolist()))
            for number, (keys, blocks) in enumerate(zip(self.case.lengths, tables, strict=True))
        ]
        return AttentionPlan.of(spans, len(self.q), count, heads, BLOCK, self.device)

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
            self.q, k, v, self.starts, None, self.case.queries, max(self.case.lengths), scale=self.scale,
            window_size=(-1, 0), seqused_k=self.used, block_table=self.table, **asked,
        )  # fmt: skip
        assert isinstance(found, Tensor)
        return found

    def seconds(self, work: Callable[[int], Tensor]) -> float:
        return captured(rotating(work, self.copies), self.device) / self.copies
