"""Times what a step adds to the base's products: the deltas of its adapters, and attention over the cache.

    python -m tests.bench.adapters_and_attention [--threads 2] [--isa avx2]

Shapes of a 1B llama (2048 hidden, 8192 intermediate, 32 heads on 8 of 64), milliseconds for its 16 layers, medians in
turn with plain PyTorch's. `of memory` is how fast the adapters' or the cache's bytes were read, over how fast memory
delivers them: small where few bytes serve many rows. One thread is timed by its own CPU time, which other processes
on the machine disturb less.
"""

import argparse
import statistics
from itertools import product

import torch

from adapters.memory import zeros
from kernels import reference
from kernels.cpu import operations
from kernels.cpu.library import Library, load
from kernels.segments import FlatSegments, Segment, Span, Spans
from server.heap import keep_large_blocks
from tests.bench.timing import read_bandwidth, seconds

SITES = [(2048, (2048, 512, 512)), (2048, (2048,)), (2048, (8192, 8192)), (8192, (2048,))]
LAYERS, COPIES, TURNS = 16, 4, 7  # copies of a layer, so that caches do not hold it
STEPS = [(1, 1), (8, 8), (16, 1), (16, 4), (16, 16), (256, 1)]  # (rows, distinct adapters)
QUERY_HEADS, HEADS, WIDTH, BLOCK = 32, 8, 64, 16
SPANS = [
    (16, 1, 700),
    (1, 1, 4000),
    (1, 256, 256),
    (1, 256, 2048),
]  # (sequences, queries of each, keys of each)
DTYPES = [torch.float32, torch.bfloat16]


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return zeros(shape, dtype, "cpu").copy_(torch.randn(shape))


class Sites:
    """Some layers' pools of adapters, and a step over them."""

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        self.pools = [
            (
                filled((17, len(widths), 16, inside), dtype),
                filled((17, 16, sum(widths)), dtype),
                torch.rand(17, len(widths)),
            )
            for _ in range(COPIES)
            for inside, widths in SITES
        ]
        self.widths = [widths for _, widths in SITES] * COPIES
        self.deltas = [
            operations.Deltas.of(library, *pool, widths)
            for pool, widths in zip(self.pools, self.widths, strict=True)
        ]

    def take(self, rows: int, distinct: int) -> int:
        """Set the step; returns the bytes that it reads of one layer's adapters."""
        each = rows // distinct
        self.segments = tuple(Segment(i * each, (i + 1) * each, (i,), (1.0,)) for i in range(distinct))
        self.x = [torch.randn(rows, a.shape[3]) for a, _, _ in self.pools]
        self.y = [torch.randn(rows, sum(widths)) for widths in self.widths]
        return distinct * sum(a[0].nbytes + b[0].nbytes for a, b, _ in self.pools) // COPIES

    def ours(self, _: None) -> None:
        flat = FlatSegments.of(self.segments)
        for deltas, y, x in zip(self.deltas, self.y, self.x, strict=True):
            deltas.add(y, x, flat)

    def plain(self, _: None) -> None:
        for (a, b, scale), widths, y, x in zip(self.pools, self.widths, self.y, self.x, strict=True):
            for segment in self.segments:
                reference.expand(y, reference.shrink(x, a, scale, segment), b, widths, segment)


class Caches:
    """Some layers' caches, and the spans of a step over them."""

    def __init__(self, library: Library, dtype: torch.dtype, step: tuple[int, int, int]) -> None:
        self.library = library
        sequences, queries, keys = step
        blocks = -(-keys // BLOCK)
        shape = ((sequences * blocks + 1) * BLOCK + 256, HEADS, WIDTH)
        self.caches = [(filled(shape, dtype), filled(shape, dtype)) for _ in range(COPIES)]
        self.spans = tuple(
            Span(i * queries, (i + 1) * queries, keys, tuple(range(1 + i * blocks, 1 + (i + 1) * blocks)))
            for i in range(sequences)
        )
        self.q = torch.randn(sequences * queries, QUERY_HEADS, WIDTH)
        self.nbytes = sequences * keys * HEADS * WIDTH * 2 * dtype.itemsize
        self.asked = {"scale": WIDTH**-0.5, "window": None, "softcap": None, "sinks": None}

    def ours(self, _: None) -> None:
        spans = Spans(self.spans, BLOCK, torch.device("cpu"))
        for k, v in self.caches:
            operations.attention(self.library, self.q, k, v, spans, **self.asked)

    def plain(self, _: None) -> None:
        spans = Spans(self.spans, BLOCK, torch.device("cpu"))
        for k, v in self.caches:
            reference.attention(self.q, k, v, spans, **self.asked)


def line(name: str, case: Sites | Caches, nbytes: int, speed: float) -> None:
    """Both in turn, then a line of medians; plain PyTorch three times, it is slow."""
    times: list[list[float]] = [[], []]
    for turn in range(TURNS):
        times[0].append(seconds(case.ours, None))
        if turn < 3:
            times[1].append(seconds(case.plain, None))
    ours, plain = (statistics.median(each) / COPIES for each in times)
    print(
        f"{name:<44} {ours * LAYERS * 1e3:9.2f} {plain * LAYERS * 1e3:9.2f} {plain / ours:6.1f}x "
        f"{nbytes / ours / speed:10.2f}",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=["portable", "avx2", "avx512"])
    asked = parser.parse_args()
    keep_large_blocks()
    library = load(asked.isa)
    torch.set_num_threads(asked.threads)
    speed = read_bandwidth()
    print(f"{library.instruction_set}, {asked.threads} threads, memory {speed / 1e9:.1f} GB/s")
    print(f"{'milliseconds for 16 layers':<44} {'ours':>9} {'plain':>9} {'ratio':>7} {'of memory':>10}")
    for dtype in DTYPES:
        sites = Sites(library, dtype)
        for rows, distinct in STEPS:
            nbytes = sites.take(rows, distinct)
            line(f"deltas {dtype} {rows} rows, {distinct} adapters", sites, nbytes, speed)
    for step, dtype in product(SPANS, DTYPES):
        caches = Caches(library, dtype, step)
        name = "attention {} {} x {} queries, {} keys".format(dtype, *step)
        line(name, caches, caches.nbytes, speed)


if __name__ == "__main__":
    main()
