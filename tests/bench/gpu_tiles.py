"""Which tile of an NF4 product is fastest for each weight of a Llama of 8 billion and each number of rows.

    python -m tests.bench.gpu_tiles --rows 16 --seconds 40 --lines tiles.jsonl

Compiles candidates by as many processes as there are cores until the time is over, then times each that compiled, in
graphs over more weights than caches hold. `kernels/tiles.py` takes its table from the lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import queue
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from kernels.lookup import Lookup
from kernels.nf4 import launch
from kernels.nf4_decode import NF4Weight
from kernels.tiles import Order, Tile, tile_for
from kernels.workspace import Workspace
from server.model.cuda import TritonLinear
from tests.bench.gpu_model import LLAMA_8B, nf4_linear
from tests.bench.gpu_products import joined_shapes
from tests.bench.gpu_timing import captured, copies_of, rotating

_SHARED_BYTES = 200_000  # of a program, which all stages must fit
_LOOKUPS: tuple[Lookup, ...] = ("shuffle", "permute", "mixed")
_ORDERS: tuple[Order, ...] = ("split", "join")


def candidates(rows: int, splits: Sequence[int]) -> list[Tile]:
    """Tiles for so many rows, in an order drawn by lot; those of the table first."""
    found = []
    for columns, warps, blocks, stages in itertools.product(
        (64, 128, 256), (2, 4, 8), (1, 2, 4), (2, 3, 4, 6)
    ):
        weights = columns * blocks * 32
        sensible = columns * rows <= warps * 32 * 96 and 8 <= columns // warps <= 32
        if (
            not sensible
            or stages * (weights + rows * blocks * 128) > _SHARED_BYTES
            or stages * weights < 12_000
        ):
            continue
        for order, lookup, split in itertools.product(_ORDERS, _LOOKUPS, splits):
            found.append(Tile(rows, columns, blocks, warps, stages, order, lookup, splits=split))
    random.Random(0).shuffle(found)
    table = [tile_for(out, width, rows, (9, 0)) for width, out in joined_shapes(LLAMA_8B).values()]
    return list(dict.fromkeys([*table, *found]))


def _weight(width: int, out: int) -> NF4Weight:
    device = torch.device("cuda")
    linear = nf4_linear(width, out, device)
    return TritonLinear.of(Workspace(device), False, [linear], torch.bfloat16).weight


def _compile(tiles: multiprocessing.Queue[Tile], done: multiprocessing.Queue[Tile], deadline: float) -> None:
    """Launch each once on a small weight, so that the compiled kernel lies in the cache of all processes."""
    weight, workspace = _weight(4096, 512), Workspace("cuda")
    while time.time() < deadline:
        try:
            tile = tiles.get(timeout=0.2)
        except queue.Empty:
            return
        x = torch.randn(tile.rows, 4096, device="cuda").bfloat16()
        y = torch.empty(tile.rows, 512, device="cuda").bfloat16()
        try:
            launch(y, x, weight, None, workspace, tile, (0, tile.rows))
            torch.cuda.synchronize()
        except Exception as error:  # too much shared memory, say: no candidate then
            print(f"{tile}: {str(error)[:200]}", file=sys.stderr)
            continue
        done.put(tile)


def compiled(tiles: Sequence[Tile], seconds: float, processes: int) -> list[Tile]:
    """Those of the tiles that compiled in time."""
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for tile in tiles:
        todo.put(tile)
    deadline = time.time() + seconds
    workers = [
        context.Process(target=_compile, args=(todo, done, deadline), daemon=True) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = []
    while any(worker.is_alive() for worker in workers) and time.time() < deadline + 15:
        try:
            found.append(done.get(timeout=0.2))
        except queue.Empty:
            continue
    while not done.empty():
        found.append(done.get())
    for worker in workers:
        worker.kill()
    todo.cancel_join_thread()
    return found


@torch.inference_mode()
def timed(tiles: Sequence[Tile], rows: int, seconds: float) -> Iterator[tuple[str, Tile, float]]:
    """(product, tile, seconds of one) for every weight and tile, until the time is over."""
    workspace, began = Workspace("cuda"), time.perf_counter()
    shapes = joined_shapes(LLAMA_8B)
    for number, (name, (width, out)) in enumerate(shapes.items(), start=1):
        weights = [_weight(width, out) for _ in range(copies_of(width * out // 2))]
        x = torch.randn(rows, width, device="cuda").bfloat16()
        y = torch.empty(rows, out, device="cuda").bfloat16()
        for tile in tiles:
            if time.perf_counter() > began + seconds * number / len(shapes):
                break

            def product(copy: int, tile: Tile = tile) -> None:
                launch(y, x, weights[copy], None, workspace, tile, (0, rows))  # noqa: B023

            yield name, tile, captured(rotating(product, len(weights)), x.device) / len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.gpu_tiles", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=40, help="for compiling, and again for timing")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--lines", type=Path, required=True)
    options = parser.parse_args()
    lists = [candidates(rows, options.splits) for rows in options.rows]
    mixed = [tile for group in itertools.zip_longest(*lists) for tile in group if tile is not None]
    tiles = compiled(mixed, options.seconds, options.processes)
    print(f"{len(tiles)} of {len(mixed)} tiles compiled", flush=True)
    with options.lines.open("a") as lines:
        for rows in options.rows:
            mine = [tile for tile in tiles if tile.rows == rows]
            best: dict[str, tuple[float, Tile]] = {}
            for name, tile, seconds in timed(mine, rows, options.seconds / len(options.rows)):
                line = {"product": name, "rows": rows, "us": round(seconds * 1e6, 3), **asdict(tile)}
                lines.write(json.dumps(line) + "\n")
                best[name] = min(best.get(name, (seconds, tile)), (seconds, tile), key=lambda each: each[0])
            for name, (seconds, tile) in best.items():
                print(f"{name} {rows}: {seconds * 1e6:.2f} us by {tile}", flush=True)


if __name__ == "__main__":
    main()
