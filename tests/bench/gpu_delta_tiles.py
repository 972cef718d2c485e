"""What makes a product with adapters fast, for each weight of a Llama of 8 billion: stages, splits, pages a turn, and
through which cache few rows are read.

    python -m tests.bench.gpu_delta_tiles --rows 32 --adapters 0 1 8 32 --lines deltas.jsonl

The table's tile is varied in those alone. Kernels are compiled by as many processes as there are cores, then timed in
graphs over more weights than caches hold; `kernels/tiles.py` takes its table from the lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kernels.lora import Deltas
from kernels.nf4 import launch
from kernels.nf4_decode import NF4Weight
from kernels.tiles import BUCKETS, Tile, tile_for
from kernels.workspace import Workspace
from server.model.cuda import TritonLinear
from tests.bench.gpu_model import LLAMA_8B, nf4_linear
from tests.bench.gpu_products import Product, plan_of, products
from tests.bench.gpu_timing import captured, copies_of, rotating, wake
from tests.bench.random_llama import Shape


def candidates(product: Product, rows: int) -> list[Tile]:
    """The table's tile first. Stages also decide how many programs share a processor: 7, 6 or 5 at 32 rows."""
    table = tile_for(product.out, product.width, rows, (9, 0))
    varied = itertools.product(
        (4, 1, 2), (0, 1, 2), sorted({table.splits, max(1, table.splits // 2), table.splits * 2})
    )
    found = [
        replace(table, jobs=jobs, stages=table.stages + more, splits=splits) for jobs, more, splits in varied
    ]
    other = [replace(table, near=0 if rows <= table.near else rows)] if rows <= BUCKETS[0] else []
    return list(dict.fromkeys([table, *other, *found]))


@dataclass(frozen=True)
class Operands:
    """Weights that no cache holds, each with pages of its own, and rows to multiply."""

    product: Product
    weights: list[NF4Weight]
    pages: list[tuple[Tensor, Tensor, Tensor]]  # a, b and scale
    x: Tensor
    y: Tensor
    workspace: Workspace

    @classmethod
    def of(cls, product: Product, rows: int, adapters: int, copies: int, device: torch.device) -> Operands:
        members, width, out = len(product.members), product.width, product.out
        workspace = Workspace(device)
        weights = [
            TritonLinear.of(workspace, False, [nf4_linear(width, out, device)], torch.bfloat16).weight
            for _ in range(copies)
        ]
        pages = [
            (
                torch.randn(adapters, members, 16, width, device=device).bfloat16() * 0.02,
                torch.randn(adapters, 16, out, device=device).bfloat16() * 0.02,
                torch.ones(adapters, members, device=device),
            )
            for _ in range(copies)
        ]
        x = torch.randn(rows, width, device=device).bfloat16()
        return cls(product, weights, pages, x, x.new_empty(rows, out), workspace)

    def walk(self, tile: Tile, adapters: int) -> Callable[[], None]:
        """One product of each weight with so many different adapters; 0 is the base's."""
        rows, device = len(self.x), self.x.device
        plan = plan_of(rows, adapters, device, False) if adapters else None

        def once(copy: int) -> Tensor:
            a, b, scale = self.pages[copy]
            deltas = Deltas(a, b, scale, self.product.members, plan) if plan else None
            launch(
                self.y, self.x, self.weights[copy], None, self.workspace, tile, (0, rows),
                lanes=tile.splits, deltas=deltas,
            )  # fmt: skip
            return self.y

        return rotating(once, len(self.weights))


def compile_all(rows: int, adapters: int, processes: int, number: int) -> None:
    """Launch every `processes`-th kernel once, so that it lies in the cache of all processes."""
    device, count = torch.device("cuda"), itertools.count()
    for product in products(LLAMA_8B):
        operands = None
        for tile in candidates(product, rows):
            if next(count) % processes != number:
                continue
            operands = operands or Operands.of(product, rows, adapters, 1, device)
            for distinct in {0, adapters}:
                operands.walk(tile, distinct)()
        torch.cuda.synchronize()


@torch.inference_mode()
def timed(
    shape: Shape, rows: int, adapters: Sequence[int], device: torch.device
) -> Iterator[tuple[str, Tile, int, float]]:
    """(product, tile, adapters, seconds of one)."""
    for product in products(shape):
        copies = copies_of(product.width * product.out // 2) if device.type == "cuda" else 1
        operands = Operands.of(product, rows, max(1, *adapters), copies, device)
        wake(device, 0.3)
        for tile, distinct in itertools.product(candidates(product, rows), adapters):
            yield product.name, tile, distinct, captured(operands.walk(tile, distinct), device) / copies


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.gpu_delta_tiles", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--lines", type=Path, required=True)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for rows in options.rows:
        work = partial(compile_all, rows, max(1, *options.adapters), options.processes)
        workers = [context.Process(target=work, args=(number,)) for number in range(options.processes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best: dict[tuple[str, int], tuple[float, Tile]] = {}
        with options.lines.open("a") as lines:
            for name, tile, distinct, seconds in timed(
                LLAMA_8B, rows, options.adapters, torch.device("cuda")
            ):
                line = {"product": name, "rows": rows, "adapters": distinct, "us": round(seconds * 1e6, 3)}
                lines.write(json.dumps(line | asdict(tile)) + "\n")
                best[name, distinct] = min(
                    best.get((name, distinct), (seconds, tile)), (seconds, tile), key=lambda each: each[0]
                )
        for (name, distinct), (seconds, tile) in best.items():
            print(f"{name}, {rows} rows, {distinct} adapters: {seconds * 1e6:.2f} us by {tile}", flush=True)


if __name__ == "__main__":
    main()
