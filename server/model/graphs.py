"""Captured steps: one graph for each bucket of rows and each class of ranks, never for how many adapters.

A decode step has one row for each sequence and wants all their logits; a step that reads prompts has more, and wants
one row of logits for each sequence at most. Both are padded to their bucket; what varies from step to step lies in one
buffer whose address the graphs hold. Knows nothing of sequences or of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, cuda

from kernels.plans import Heads
from kernels.segments import FlatSpans
from server.model.kv_cache import KVCache
from server.model.runner import StepInputs
from server.model.stand_ins import stand_in
from server.model.step_tables import StepLayout, StepTensors

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
PROMPT_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048)  # of steps that read prompts
PAGE_CLASSES = (1, 4, 16)  # pages of a segment at most: ranks up to 16, 64 and 256


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Which steps are captured."""

    sequences: int  # in a step, at most
    length: int  # tokens of a sequence, at most
    pages: int  # of a segment, at most
    tokens: int = 0  # of a step that reads prompts, at most; 0: none of them is captured

    @property
    def buckets(self) -> tuple[int, ...]:
        """Rows, the last bucket being cut at the number of sequences."""
        return _up_to(self.sequences, BUCKETS)

    @property
    def prompt_buckets(self) -> tuple[int, ...]:
        """Rows of steps that read prompts, the last bucket being cut at the number of tokens."""
        return _up_to(self.tokens, PROMPT_BUCKETS) if self.tokens else ()

    @property
    def classes(self) -> tuple[int, ...]:
        """Pages, 0 for a step without adapters."""
        return (0, *_up_to(self.pages, PAGE_CLASSES))

    def layouts(self, groups: Iterable[str], cache: KVCache, heads: Heads, fixed: bool) -> list[StepLayout]:
        """Of every graph; the blocks of a step that shares prefixes may be more than the cache has, and are not
        captured then.

        Prompts are not captured for batch-invariant kernels: their parts of keys would need room for the longest
        text in every row.
        """
        each = -(-self.length // cache.block_size)
        names = list(groups)
        sizes: list[tuple[int, int | None, int]] = [(rows, None, rows) for rows in self.buckets]
        if not fixed:
            sizes += [
                (rows, min(rows, self.sequences), -(-rows // cache.block_size))
                for rows in self.prompt_buckets
            ]
        return [
            StepLayout.bucket(
                rows,
                wanted,
                groups=names,
                pages=pages,
                most_blocks=max(least_blocks, min((wanted or rows) * each, cache.blocks)),
                block_size=cache.block_size,
                heads=heads,
                fixed=fixed,
            )
            for rows, wanted, least_blocks in sizes
            for pages in self.classes
        ]


def _up_to(most: int, buckets: tuple[int, ...]) -> tuple[int, ...]:
    """The buckets below, and `most` or the largest of them."""
    last = min(most, buckets[-1])
    return (*(each for each in buckets if each < last), last)


@dataclass(frozen=True, slots=True)
class Graph:
    """One captured step: the layout of its buffer, and where it leaves its logits."""

    layout: StepLayout
    pages: int
    buffer: Tensor
    logits: Tensor  # [rows that are wanted, vocabulary] float32
    captured: Any  # torch.cuda.CUDAGraph

    def fits(self, inputs: StepInputs, pages: int, blocks: int) -> bool:
        """Whether it can run the step, whose segments have so many pages at most and whose spans so many blocks."""
        layout, rows, wanted = self.layout, len(inputs.token_ids), len(inputs.logits_rows)
        if rows > layout.rows or pages > self.pages or blocks > layout.most_blocks:
            return False
        if layout.wanted is None:
            return len(inputs.spans) == rows and np.array_equal(inputs.logits_rows, np.arange(rows))
        return len(inputs.spans) <= layout.wanted and wanted <= layout.wanted

    def replay(
        self,
        host: Tensor,  # [used] int32, pinned
        sent: cuda.Event,
    ) -> Tensor:  # [rows that are wanted, vocabulary] float32
        """Run the step that the host buffer holds; `sent` is recorded when the device has fetched it."""
        self.buffer[: len(host)].copy_(host, non_blocking=True)
        sent.record()
        self.captured.replay()
        return self.logits


class Graphs:
    """All captured steps, over one buffer of inputs, one of logits and one pool of memory."""

    def __init__(
        self,
        run: Callable[[StepTensors], Tensor],
        layouts: Iterable[StepLayout],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self._run = run
        self._layouts = sorted(layouts, key=_effort, reverse=True)
        size = max(layout.size for layout in self._layouts)
        rows = max(layout.logits for layout in self._layouts)
        self._device = device
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self._logits = torch.zeros(rows, vocabulary, dtype=torch.float32, device=device)
        self._graphs: list[Graph] = []  # the smallest first

    def find(self, inputs: StepInputs) -> Graph | None:
        """The smallest graph that can run the step; None when none was captured for its like."""
        distinct = {id(segments): segments for segments in inputs.segments.values()}
        pages = max((len(s.pages) for segments in distinct.values() for s in segments), default=0)
        blocks = len(FlatSpans.of(inputs.spans).blocks)
        return next((graph for graph in self._graphs if graph.fits(inputs, pages, blocks)), None)

    def capture(self, progress: Callable[[int, int], None]) -> None:
        """Run each step once, so that kernels are compiled and work space has grown, then capture it; largest first."""
        pool = cuda.graph_pool_handle()
        stream = cuda.Stream(self._device)
        stream.wait_stream(cuda.current_stream(self._device))
        for done, layout in enumerate(self._layouts):
            host = torch.zeros(layout.size, dtype=torch.int32)
            layout.fill(host.numpy(), _stand_in(layout))
            with cuda.stream(stream):
                self._buffer[: layout.size].copy_(host)
                self._step(layout)
            cuda.synchronize(self._device)
            captured = cuda.CUDAGraph()
            with cuda.graph(captured, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._step(layout)
            logits = self._logits[: layout.logits]
            self._graphs.insert(0, Graph(layout, _pages(layout), self._buffer, logits, captured))
            progress(done + 1, len(self._layouts))
        cuda.synchronize(self._device)

    def _step(self, layout: StepLayout) -> None:
        logits = self._run(layout.view(self._buffer))
        self._logits[: layout.logits].copy_(logits)


def _pages(layout: StepLayout) -> int:
    return max(layout.most_pages.values(), default=0)


def _effort(layout: StepLayout) -> tuple[int, bool, int]:
    """By which the least graph that fits is found: of as many rows, decodes alone before prompts."""
    return layout.rows, layout.wanted is not None, _pages(layout)


def _stand_in(layout: StepLayout) -> StepInputs:
    """A full step of the layout, decodes or one prompt."""
    return stand_in(
        [1] * layout.rows if layout.wanted is None else [layout.rows],
        layout.logits,
        groups=layout.most_pages,
        pages=_pages(layout),
        block_size=layout.block_size,
    )
