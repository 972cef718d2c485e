"""The CPU's speed, each figure a ratio of medians measured in turn in one run.

    python -m tests.bench.cpu            # a 1B Llama shape with random weights, 32 adapters of rank 16
    python -m tests.bench.cpu --quick    # fewer rounds, fewer batches

Ends with a line per figure, `figure NAME VALUE BOUND ok|short`; exits 1 when any is short. The lines of a run are kept
in `loadtests/results/cpu.jsonl`, and `python -m tests.bench.report` makes docs/performance.md of the newest.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.bench.contestants import PREFILL, Ours, Peft
from tests.bench.figures import Figure, Results
from tests.bench.http import http_tokens_per_s
from tests.bench.random_llama import Checkpoint, Shape, checkpoint

BATCHES = (1, 4, 8, 16)
SEED = 0
READ_FLOATS = 400_000_000  # 1.6 GB: no cache holds it

Adapters = list[int | None]
Measure = Callable[[], float]


def popularity(kind: str, batch: int) -> Adapters:
    """Which adapter each sequence of a batch names."""
    match kind:
        case "base":
            return [None] * batch
        case "identical":
            return [0] * batch
        case "distinct":
            return list(range(batch))
        case _:  # zipf: the k-th adapter is asked for 1/k as often as the first
            draw = random.Random(SEED)
            return draw.choices(range(32), weights=[1 / (k + 1) for k in range(32)], k=batch)


def in_turn(measures: Mapping[Any, Measure], rounds: int, what: str) -> dict[Any, float]:
    """The median of each measure; one of each in every round, so that a slow minute hits them all."""
    seen: dict[Any, list[float]] = {key: [] for key in measures}
    turns = list(itertools.product(range(rounds), measures))
    for _, key in tqdm(turns, desc=what, disable=not sys.stderr.isatty()):
        seen[key].append(measures[key]())
    return {key: statistics.median(values) for key, values in seen.items()}


def read_bandwidth() -> float:
    """Bytes per second: the best of five reads of a vector that no cache holds, on all threads."""
    vector = torch.ones(READ_FLOATS)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        vector.sum()
        best = min(best, time.perf_counter() - began)
    return vector.nbytes / best


class Bench:
    """One run: the contestants, what was measured so far, and the figures it gives."""

    def __init__(self, made: Checkpoint, work: Path, quick: bool, results: Results) -> None:
        self.made, self.work, self.results = made, work, results
        self.rounds, self.steps = (2, 12) if quick else (5, 24)
        self.batches = (1, 8, 16) if quick else BATCHES
        self.figures: list[Figure] = []
        self.int8 = int8_reason()

    def ours(self, stack: ExitStack, name: str, **settings: Any) -> Ours:
        """A contestant of ours; closed with the stack."""
        made = Ours(self.made, self.work / name, settings.pop("adapters", 0), **settings)
        stack.callback(made.close)
        return made

    def note(self, name: str, seconds: Mapping[Any, float]) -> dict[Any, float]:
        """Keep a table of measurements."""
        for key, value in seconds.items():
            self.results.add(name=name, case=list(key), seconds=round(value, 6))
        return dict(seconds)

    def at_least(self, name: str, value: float, bound: float) -> None:
        self.figures.append(Figure(name, value, bound, "at least"))

    def at_most(self, name: str, value: float, bound: float) -> None:
        self.figures.append(Figure(name, value, bound, "at most"))

    def products(self) -> None:
        """Decode and prefill against bitsandbytes' own path in the same engine, base only."""
        with ExitStack() as stack:
            contestants = {"fp32": self.ours(stack, "fp32")}
            if self.int8 is None:
                contestants["int8"] = self.ours(stack, "int8", cpu_math="int8")
            for dtype in ("float32", "bfloat16"):
                contestants[f"bitsandbytes-{dtype}"] = self.ours(
                    stack, dtype, linear_backend="bitsandbytes", dtype=dtype
                )
            decode: dict[Any, Measure] = {
                (who, batch): partial(c.decode, [None] * batch, self._steps(who))
                for batch in self.batches
                for who, c in contestants.items()
            }
            steps = self.note("decode", in_turn(decode, self.rounds, "decode"))
            prefill = {(who, PREFILL): c.prefill for who, c in contestants.items()}
            filled = self.note("prefill", in_turn(prefill, self.rounds, "prefill"))
        theirs = [who for who in contestants if who.startswith("bitsandbytes")]
        for who, batch, bound in (("fp32", 1, 1.3), ("fp32", 16, 1.7), ("int8", 16, 2.8)):
            if who in contestants:
                best = min(steps[other, batch] for other in theirs)
                self.at_least(f"decode_{who}_batch{batch}_vs_bitsandbytes", best / steps[who, batch], bound)
        for who, bound in (("fp32", 1.9), ("int8", 4.0)):
            if who in contestants:
                best = min(filled[other, PREFILL] for other in theirs)
                self.at_least(f"prefill_{who}_vs_bitsandbytes", best / filled[who, PREFILL], bound)
        self._floor(steps["fp32", 1])

    def _steps(self, who: str) -> int:
        """Few for those who need a second and more for each, where one step is as long as the next."""
        return self.steps if who in ("fp32", "int8") else 4

    def _floor(self, step: float) -> None:
        shape = self.made.shape
        nbytes = (
            shape.linear_weights * (0.5 + 4 / 64) + shape.head_weights * 2
        )  # codes, absmax; lm_head in bfloat16
        bandwidth = self.bandwidth
        self.results.add(name="bandwidth", gb_per_s=round(bandwidth / 1e9, 2))
        self.at_most("decode_batch1_vs_memory_floor", step / (nbytes / bandwidth), 1.25)

    @property
    def bandwidth(self) -> float:
        if not hasattr(self, "_bandwidth"):
            self._bandwidth = read_bandwidth()
        return self._bandwidth

    def adapters(self) -> None:
        """What adapters add to a step, by how requests spread over them; and the offline side of HTTP's figure."""
        with ExitStack() as stack:
            ours = self.ours(stack, "adapters", adapters=32, adapter_dtype="bfloat16", max_loras=32)
            kinds = ("base", "identical", "distinct", "zipf")
            cases: dict[Any, Measure] = {
                (kind, batch): partial(ours.decode, popularity(kind, batch), self.steps)
                for batch in self.batches
                for kind in kinds
            }
            for batch in self.batches:  # adapters are read from disk once, outside the times
                ours.decode(popularity("distinct", batch), 2)
            steps = self.note("adapters", in_turn(cases, self.rounds, "adapters"))
        base = steps["base", 16]
        nbytes = 16 * self.made.shape.adapter_weights * 2
        self.at_most(
            "tax_16_distinct", steps["distinct", 16] / base, 1 + 1.5 * (nbytes / self.bandwidth) / base
        )
        self.at_most("tax_one_adapter", steps["identical", 16] / base, 1.06)

    def against_peft(self) -> None:
        """Aggregate tokens per second of a mixed batch, all adapters distinct."""
        with ExitStack() as stack:
            contestants: dict[str, Any] = {"fp32": self.ours(stack, "fp32-peft", adapters=16)}
            if self.int8 is None:
                contestants["int8"] = self.ours(stack, "int8-peft", adapters=16, cpu_math="int8")
            for dtype in (torch.float32, torch.bfloat16):
                contestants[f"peft-{str(dtype).removeprefix('torch.')}"] = Peft(self.made, 16, dtype)
            cases: dict[Any, Measure] = {
                (who, batch): partial(c.decode, list(range(batch)), self._steps(who))
                for batch in (8, 16)
                for who, c in contestants.items()
            }
            steps = self.note("mixed", in_turn(cases, min(self.rounds, 3), "against peft"))
        for who, batch, bound in (("fp32", 8, 2.5), ("fp32", 16, 2.5), ("int8", 8, 3.5), ("int8", 16, 4.0)):
            if who in contestants:
                best = min(steps[other, batch] for other in contestants if other.startswith("peft"))
                self.at_least(f"mixed_{who}_batch{batch}_vs_peft", best / steps[who, batch], bound)

    def http(self) -> None:
        """Eight streams over HTTP against eight sequences in process, the same adapters and tokens."""
        with ExitStack() as stack:
            ours = self.ours(stack, "http", adapters=8)
            ours.decode(list(range(8)), 2)
            offline = statistics.median(
                ours.tokens_per_s(list(range(8)), self.steps) for _ in range(self.rounds)
            )
        served, client_seconds = http_tokens_per_s(self.made, 8, self.steps, self.rounds)
        self.results.add(
            name="http", offline=round(offline, 2), http=round(served, 2), client_cpu_s=client_seconds
        )
        print(
            f"http: {served:.1f} tokens/s of {offline:.1f} offline; the client took {client_seconds:.2f} CPU seconds"
        )
        self.at_least("http_vs_offline", served / offline, 0.85)


def int8_reason() -> str | None:
    """Why int8 products cannot be timed here, or None."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return None if "avx512_vnni" in flags or "avx_vnni" in flags else "this CPU has no VNNI"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)
    command = "make bench-cpu" + (" QUICK=1" if options.quick else "")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraplex" / "bench"
    made = checkpoint(Shape(), cache)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as work:
        bench = Bench(made, Path(work), options.quick, Results("cpu", command, SEED))
        if bench.int8 is not None:
            print(f"int8 is not timed: {bench.int8}")
        for part in (bench.products, bench.adapters, bench.against_peft, bench.http):
            part()
    return bench.results.close(bench.figures)


if __name__ == "__main__":
    sys.exit(main())
