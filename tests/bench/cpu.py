"""The CPU's speed, each figure a ratio of medians measured in turn in one run.

    python -m tests.bench.cpu            # a 1B Llama shape with random weights, 32 adapters of rank 16
    python -m tests.bench.cpu --quick    # fewer rounds, batches and adapters

Ends with a line per figure, `figure NAME VALUE BOUND ok|short`, or `figure NAME - BOUND unmeasured (why)`; exits 1 when
any is short. The lines of a run are kept in `loadtests/results/cpu.jsonl`, and `make bench-report` makes
docs/performance.md of the newest.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from loadtests.load import instructions
from tests.bench.contestants import PREFILL, Apart, Ours, Peft
from tests.bench.figures import Figure, Results, Want
from tests.bench.http import streams_over_http
from tests.bench.random_llama import Checkpoint, Shape, checkpoint
from tests.bench.timing import read_bandwidth

SEED = 0
FEWEST = 3  # steps of those who need seconds for each, or a run takes more than its quarter of an hour
SLOW = 2.0  # seconds for 64 tokens of a prompt; who needs more than that needs seconds for a step of sixteen


@dataclass(frozen=True)
class Plan:
    """How long a run may take: many short rounds, since a neighbour on the machine comes and goes within seconds."""

    rounds: int
    slow_rounds: int  # of those who need seconds for a step
    steps: int  # that a sequence decodes
    few: int  # the same where many are not worth their time
    taxed: int  # rounds of steps with adapters, each between steps of the base
    streamed: int  # tokens of a stream
    batches: tuple[int, ...]  # 1 and 16 are what figures are about
    adapters: int  # that a server takes in: 16 are asked for at once


FULL, QUICK = Plan(7, 3, 10, 5, 14, 48, (1, 4, 8, 16), 32), Plan(3, 1, 6, 3, 3, 16, (1, 16), 16)
THEIRS = {"bitsandbytes-float32": torch.float32, "bitsandbytes-bfloat16": torch.bfloat16}

Adapters = list[int | None]
Measure = Callable[[], float]


def popularity(kind: str, batch: int, adapters: int) -> Adapters:
    """Which of the adapters each sequence of a batch names."""
    match kind:
        case "base":
            return [None] * batch
        case "identical":
            return [0] * batch
        case "distinct":
            return list(range(batch))
        case _:  # zipf: the k-th adapter is asked for 1/k as often as the first
            draw = random.Random(SEED)
            return draw.choices(range(adapters), weights=[1 / (k + 1) for k in range(adapters)], k=batch)


def in_turn(measures: Mapping[Any, Measure], rounds: Callable[[Any], int], what: str) -> dict[Any, float]:
    """The median of each measure, taken in `rounds` rounds spread over all, so that a slow minute hits all measures."""
    seen: dict[Any, list[float]] = {key: [] for key in measures}
    most = max(map(rounds, measures))
    every = itertools.product(range(most), measures)
    turns = [key for number, key in every if number * rounds(key) % most < rounds(key)]
    for key in tqdm(turns, desc=what, disable=not sys.stderr.isatty()):
        seen[key].append(measures[key]())
    return {key: statistics.median(values) for key, values in seen.items()}


def after(first: Callable[[], object], measure: Measure) -> Measure:
    """The measure, with something done before it and outside its time."""

    def measured() -> float:
        first()
        return measure()

    return measured


class Bench:
    """One run: the contestants, each loaded once in a process of its own, and the figures so far."""

    def __init__(self, made: Checkpoint, work: Path, plan: Plan, results: Results, stack: ExitStack) -> None:
        self.made, self.work, self.plan, self.results, self._stack = made, work, plan, results, stack
        self.figures: list[Figure] = []
        self.int8 = int8_reason()
        self.slow = False  # whether the others need seconds for each step
        self.peft_dtype = torch.bfloat16  # until bitsandbytes was seen to decode faster in another
        self.bandwidth = 0.0  # the highest seen
        given = {"adapters": plan.adapters, "adapter_dtype": "bfloat16", "max_loras": plan.adapters}
        self.ours = {"fp32": self._load("fp32", **given)}
        if self.int8 is None:
            self.ours["int8"] = self._load("int8", cpu_math="int8", **given)

    def run(self) -> None:
        """All parts, each in turn with whom it is compared with."""
        for part in (self.products, self.adapters, self.against_peft, self.http):
            began = time.perf_counter()
            part()
            print(f"{part.__name__}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    def products(self) -> None:
        """Decode and prefill against bitsandbytes' own products in the same engine, base only."""
        with ExitStack() as stack:
            theirs = self._load("theirs", stack, linear_backend="bitsandbytes")
            chosen = {who: partial(theirs.multiply_in, dtype) for who, dtype in THEIRS.items()}
            trials = {who: after(choose, partial(theirs.prefill, 64))() for who, choose in chosen.items()}
            faster = min(trials, key=trials.__getitem__)  # the other may take half a minute
            self.slow = trials[faster] > SLOW
            decode: dict[Any, Measure] = {("memory", 1): self._floor}
            prefill: dict[Any, Measure] = {(who, PREFILL): ours.prefill for who, ours in self.ours.items()}
            for batch in self.plan.batches:
                for who, ours in self.ours.items():
                    decode[who, batch] = partial(ours.decode, [None] * batch, self._steps(who, batch))
                for who, choose in chosen.items():
                    decode[who, batch] = after(
                        choose, partial(theirs.decode, [None] * batch, self._steps(who, batch))
                    )
            prefill[faster, PREFILL] = after(chosen[faster], theirs.prefill)
            steps, filled = self._timed("decode", decode), self._timed("prefill", prefill)
        self.results.add(name="bandwidth", gb_per_s=round(self.bandwidth / 1e9, 2))
        self.peft_dtype = min(THEIRS.items(), key=lambda item: steps[item[0], 16])[1]
        for who, batch, bound in (("fp32", 1, 1.3), ("fp32", 16, 1.7), ("int8", 16, 2.8)):
            self._ratio(f"decode_{who}_batch{batch}_vs_bitsandbytes", steps, who, THEIRS, batch, bound)
        for who, bound in (("fp32", 1.9), ("int8", 4.0)):
            self._ratio(f"prefill_{who}_vs_bitsandbytes", filled, who, [faster], PREFILL, bound)
        self._figure("decode_batch1_vs_memory_floor", steps["fp32", 1] / steps["memory", 1], 1.25, "at most")

    def adapters(self) -> None:
        """What adapters add to a step, by how requests spread over them."""
        ours = self.ours["fp32"]
        cases: dict[Any, Measure] = {
            (kind, batch): partial(
                ours.decode, popularity(kind, batch, self.plan.adapters), self._steps("fp32", batch)
            )
            for batch in self.plan.batches
            for kind in ("base", "identical", "distinct", "zipf")
        }
        for first in range(0, self.plan.adapters, 16):  # they are read from disk once, outside the times
            ours.decode(list(range(first, first + 16)), 2)
        steps = self._timed("adapters", cases)
        kinds = {
            kind: partial(self._over_base, popularity(kind, 16, self.plan.adapters))
            for kind in ("distinct", "identical")
        }
        taxes = in_turn(kinds, lambda _: self.plan.taxed, "tax")
        tax = 1.5 * (16 * self.made.shape.adapter_weights * 2 / self.bandwidth) / steps["base", 16]
        self._figure("tax_16_distinct", taxes["distinct"], 1 + tax, "at most")
        self._figure("tax_one_adapter", taxes["identical"], 1.06, "at most")

    def _over_base(self, adapters: Adapters) -> float:
        """A step with these adapters, as a multiple of the base's just before and after it."""
        ours, base = self.ours["fp32"], [None] * len(adapters)
        before, step, after = (ours.decode(each, self.plan.few) for each in (base, adapters, base))
        return 2 * step / (before + after)

    def against_peft(self) -> None:
        """Aggregate tokens per second of a mixed batch, all adapters distinct."""
        theirs = "peft-" + str(self.peft_dtype).removeprefix("torch.")
        peft = Apart(Peft, self.made, 16, self.peft_dtype)
        self._stack.callback(peft.close)
        contestants = {**self.ours, theirs: peft}
        cases: dict[Any, Measure] = {
            (who, batch): partial(c.decode, list(range(batch)), self._steps(who, batch))
            for batch in (8, 16)
            for who, c in contestants.items()
        }
        steps = self._timed("mixed", cases)
        for who, batch, bound in (("fp32", 8, 2.5), ("fp32", 16, 2.5), ("int8", 8, 3.5), ("int8", 16, 4.0)):
            self._ratio(f"mixed_{who}_batch{batch}_vs_peft", steps, who, [theirs], batch, bound)

    def http(self) -> None:
        """Eight streams over HTTP against eight sequences in process, the same adapters and tokens."""
        ours, eight, tokens = self.ours["fp32"], list(range(8)), self.plan.streamed
        ours.decode(eight, 2)
        with streams_over_http(self.made, len(eight)) as streams:
            measures: dict[Any, Measure] = {
                "offline": partial(ours.tokens_per_s, eight, tokens),
                "http": partial(streams.tokens_per_s, tokens),
            }
            rates = in_turn(measures, lambda _: self.plan.rounds, "http")
        offline, served, client = rates["offline"], rates["http"], statistics.median(streams.cpu_seconds)
        self.results.add(
            name="http", offline=round(offline, 2), http=round(served, 2), client_cpu_s=round(client, 3)
        )
        print(
            f"http: {served:.1f} tokens/s of {offline:.1f} offline; the client took {client:.2f} CPU seconds"
        )
        self._figure("http_vs_offline", served / offline, 0.85, "at least")

    def _load(self, name: str, stack: ExitStack | None = None, adapters: int = 0, **settings: Any) -> Apart:
        made = Apart(Ours, self.made, self.work / name, adapters, **settings)
        (stack or self._stack).callback(made.close)
        return made

    def _floor(self) -> float:
        """Seconds in which memory delivers the base's weights, as fast as it is at the moment."""
        shape, bandwidth = self.made.shape, read_bandwidth()
        self.bandwidth = max(self.bandwidth, bandwidth)
        codes_and_absmax, head_in_bfloat16 = shape.linear_weights * (0.5 + 4 / 64), shape.head_weights * 2
        return (codes_and_absmax + head_in_bfloat16) / bandwidth

    def _steps(self, who: str, batch: int) -> int:
        """For a sequence alone more of them: they are short."""
        if not _is_theirs(who):
            return self.plan.steps * (4 if batch == 1 else 1)
        return FEWEST if self.slow else self.plan.few

    def _rounds(self, who: str) -> int:
        return self.plan.slow_rounds if self.slow and _is_theirs(who) else self.plan.rounds

    def _timed(self, name: str, measures: Mapping[Any, Measure]) -> dict[Any, float]:
        """The measures' medians, kept as lines of the results."""
        seconds = in_turn(measures, lambda key: self._rounds(key[0]), name)
        for key, value in seconds.items():
            self.results.add(name=name, case=list(key), seconds=round(value, 9))
        return seconds

    def _ratio(
        self,
        name: str,
        seconds: Mapping[Any, float],
        who: str,
        others: Iterable[str],
        size: int,
        bound: float,
    ) -> None:
        """The figure of how many times faster one is than the best of others; unmeasured where it cannot run here."""
        best = min(seconds[other, size] for other in others)
        value = best / seconds[who, size] if who in self.ours else None
        self._figure(name, value, bound, "at least")

    def _figure(self, name: str, value: float | None, bound: float, want: Want) -> None:
        self.figures.append(Figure(name, value, bound, want, None if value is not None else self.int8))


def _is_theirs(who: str) -> bool:
    return who.startswith(("bitsandbytes", "peft"))


def int8_reason() -> str | None:
    """Why int8 products cannot be timed here, or None."""
    return None if {"VNNI", "VNNI for AVX2"} & {*instructions()} else "this CPU has no VNNI"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)
    command = "make bench-cpu" + (" QUICK=1" if options.quick else "")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraplex" / "bench"
    made = checkpoint(Shape(), cache)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as work, ExitStack() as stack:
        results = Results("cpu", command, SEED)
        bench = Bench(made, Path(work), QUICK if options.quick else FULL, results, stack)
        bench.run()
    return results.close(bench.figures)


if __name__ == "__main__":
    sys.exit(main())
