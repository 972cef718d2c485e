"""A GPU's speed: products, deltas, whole steps, loads and what an upload costs, each beside the floor of its bytes.

    python -m tests.bench.gpu            # a random Llama of 8 billion weights in NF4; about 5 minutes
    python -m tests.bench.gpu --dry-run  # the same code on tiny shapes on the CPU: no number means anything or is kept

Ends with a line per figure, `figure NAME VALUE BOUND ok|short`; exits 1 when any is short. A part that fails is one
short figure, and the others run all the same. Lines go to `loadtests/results/<gpu>-bench.jsonl`;
`make bench-report` makes a part of docs/performance.md of the newest run.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from adapters.adapter import Adapter, Delta
from adapters.side_stream import SideStream
from server.model.cuda import cuda_kernels
from server.model.device_runner import DeviceRunner
from tests.bench import figures
from tests.bench.figures import Figure, Results
from tests.bench.gpu_attention import Case, attention_seconds
from tests.bench.gpu_contestants import Segments, decode_seconds, looping, peft_seconds
from tests.bench.gpu_model import GROWTH, LLAMA_8B, TINY, Engine, random_llama
from tests.bench.gpu_products import ROWS, Linears, all_layers, product_seconds
from tests.bench.gpu_profile import kernel_seconds
from tests.bench.gpu_timing import called, copy_bandwidth, host_bandwidth, wake
from tests.bench.gpu_traffic import disturbances
from tests.bench.random_llama import RANK, Shape

SEED = 0
NF4_BYTES = 0.5 + 4 / 64  # of a weight: its code and its share of an absmax
H200_STEP_MS = 4.6
MOST_SECONDS = 330  # on a device: with gpu-check before it, all is to end within ten minutes


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    shape: Shape
    device: torch.device
    rows: tuple[int, ...]  # of products
    batches: tuple[int, ...]
    main_batch: int  # of the step that others are timed beside
    attended: tuple[Case, ...]
    distinct: tuple[tuple[int, int], ...]  # (rows, adapters) of the deltas alone
    layers: int  # of the deltas alone
    context: int
    prompts: tuple[int, ...]  # tokens of one that is read in a step, the longest without a graph
    steps: int
    warm_up: int  # steps before those
    peft_steps: int
    rank_loaded: int
    repeats: int
    streams: int
    quiet_tokens: int  # of each stream before an upload
    copy_bytes: int
    most_seconds: float  # after which no part begins


def full(device: torch.device) -> Plan:
    return Plan(
        shape=LLAMA_8B, device=device, rows=ROWS, batches=(1, 8, 32, 64, 128), main_batch=32,
        attended=(Case(1, 1, 1024), Case(32, 1, 1024), Case(128, 1, 1024), Case(32, 1, 1024, 65536),
                  Case(1, 2048, 2048), Case(4, 512, 2048)),
        distinct=((32, 1), (32, 8), (32, 32), (64, 64)), layers=8, context=1024, prompts=(128, 512, 2048), steps=30,
        warm_up=3, peft_steps=6, rank_loaded=32, repeats=5, streams=8, quiet_tokens=400, copy_bytes=2 << 30,
        most_seconds=MOST_SECONDS,
    )  # fmt: skip


def dry() -> Plan:
    return Plan(
        shape=TINY, device=torch.device("cpu"), rows=(1,), batches=(2,), main_batch=2,
        attended=(Case(1, 1, 3), Case(2, 1, 3, 300)), distinct=((2, 2),), layers=1, context=3, prompts=(3, 4), steps=1,
        warm_up=0, peft_steps=3, rank_loaded=4, repeats=1, streams=1, quiet_tokens=1, copy_bytes=1 << 20,
        most_seconds=math.inf,
    )  # fmt: skip


class Bench:
    """One run: what was measured so far, and the figures it gives."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan, self.results = plan, results
        self.shape, self.device = plan.shape, plan.device
        self.figures: list[Figure] = []
        self.step_seconds = float("nan")  # ours at the main batch, all adapters distinct
        self.bandwidth = self.host_bandwidth = float("nan")

    def note(self, name: str, case: Sequence[Any], seconds: float, floor: float | None = None) -> None:
        """Keep a measurement, and show it."""
        given = {} if floor is None else {"floor_seconds": round(floor, 9)}
        self.results.add(name=name, case=list(case), seconds=round(seconds, 9), **given)
        ratio = "" if not floor else f"  {seconds / floor:.2f}x its floor"
        print(f"{name} {' '.join(map(str, case))}: {seconds * 1e3:.3f} ms{ratio}", flush=True)

    def at_least(self, name: str, value: float, bound: float) -> None:
        self.figures.append(Figure(name, value, bound, "at least"))

    def at_most(self, name: str, value: float, bound: float) -> None:
        self.figures.append(Figure(name, value, bound, "at most"))

    @property
    def adapter_bytes(self) -> int:
        """Of one adapter of one page on every linear."""
        return self.shape.adapter_weights * 2

    @property
    def position_bytes(self) -> int:
        """Of keys and values of one position, in all layers."""
        return 2 * self.shape.layers * self.shape.kv_heads * (self.shape.hidden // self.shape.heads) * 2

    def step_floor(self, batch: int, distinct: int, context: int) -> float:
        """Seconds in which memory delivers weights, head, adapters and the keys and values of all contexts."""
        shape = self.shape
        nbytes = shape.linear_weights * NF4_BYTES + shape.head_weights * 2
        return (
            nbytes + distinct * self.adapter_bytes + batch * context * self.position_bytes
        ) / self.bandwidth

    def memory(self) -> None:
        """How fast the device copies, and how fast it fetches from pinned memory: all floors are made of these."""
        self.bandwidth = copy_bandwidth(self.device, self.plan.copy_bytes)
        self.host_bandwidth = host_bandwidth(self.device, self.plan.copy_bytes // 8)
        self.results.add(
            name="bandwidth",
            gb_per_s=round(self.bandwidth / 1e9, 1),
            host_gb_per_s=round(self.host_bandwidth / 1e9, 2),
        )
        speeds = (self.bandwidth / 1e9, self.host_bandwidth / 1e9)
        print("memory: {:.0f} GB/s read and written, {:.1f} GB/s from the host".format(*speeds))

    def products(self) -> None:
        """The linears of all layers: ours, bitsandbytes', cuBLAS in bfloat16."""
        seconds = product_seconds(self.shape, self.plan.rows, self.device)
        for (who, name, rows), value in seconds.items():
            self.note("product", (who, name, rows), value)
        layers, floor = self.shape.layers, self.shape.linear_weights * NF4_BYTES / self.bandwidth
        total = {
            (who, rows): all_layers(seconds, who, rows, layers)
            for who in ("ours", "bitsandbytes", "cublas")
            for rows in self.plan.rows
        }
        for (who, rows), value in total.items():
            self.note("linears", (who, rows), value, floor)
        few = [rows for rows in self.plan.rows if rows <= 16]
        self.at_most("linears_rows_1_to_16_vs_floor", max(total["ours", rows] for rows in few) / floor, 1.7)
        for rows, bound in ((32, 1.9), (64, 2.2)):
            if rows in self.plan.rows:
                self.at_most(f"linears_rows_{rows}_vs_floor", total["ours", rows] / floor, bound)
        self.at_least(
            "linears_rows_1_to_16_vs_cublas", min(total["cublas", r] / total["ours", r] for r in few), 2.2
        )
        for rows in self.plan.rows:
            faster = total["bitsandbytes", rows] / total["ours", rows]
            self.at_least(f"linears_rows_{rows}_vs_bitsandbytes", faster, 1.0 if rows <= 64 else 0.98)

    def attention(self) -> None:
        """Ours and torch's `varlen_attn`, of which neither softcap nor sinks can be asked."""
        for case in self.plan.attended:
            ours, theirs = attention_seconds(self.shape, case, self.device)
            name = str(case)
            floor = sum(case.lengths) * self.position_bytes / self.shape.layers / self.bandwidth
            self.note("attention", ("ours", name), ours, floor)
            if isinstance(theirs, str):
                print(f"varlen_attn {name}: {theirs}", flush=True)
            else:
                self.note("attention", ("varlen_attn", name), theirs, floor)

    def engine(self) -> None:
        """Whole steps of our engine, the deltas within the linears, prompts, and an adapter's way to the device."""
        plan = self.plan
        engine = Engine(
            random_llama(self.shape, self.device),
            cuda_kernels(self.device, fixed=False),
            adapters=max(plan.batches),
            positions=(max(plan.batches) + 1) * (max(plan.context, max(plan.prompts) // 2) + GROWTH),
            buckets=plan.batches,
            prompts=plan.prompts[:-1],
        )
        for part in (self._decode, self._prefill, self._deltas, self._load, self._kernels):
            wake(self.device)  # by now kernels were compiled and graphs captured, or memory was filled
            part(engine)

    def _decode(self, engine: Engine) -> None:
        plan = self.plan
        for batch in plan.batches:
            kinds: dict[str, list[int | None]] = {
                "base": [None] * batch,
                "identical": [0] * batch,
                "distinct": list(range(batch)),
            }
            for kind, adapters in kinds.items():
                seconds = decode_seconds(engine, adapters, plan.context, plan.steps, plan.warm_up)
                floor = self.step_floor(batch, len(set(adapters) - {None}), plan.context)
                self.note("decode", (kind, batch), seconds, floor)
                if (kind, batch) == ("distinct", plan.main_batch):
                    self.step_seconds = seconds
                    self.at_most(f"decode_{batch}_distinct_vs_floor", seconds / floor, 1.65)
                    if _gpu_name(self.device) == "h200":
                        self.at_most(f"decode_{batch}_distinct_ms", seconds * 1e3, H200_STEP_MS)

    def _prefill(self, engine: Engine) -> None:
        """Prompts read whole in a step, replayed where there is a graph, and launched as they come."""
        runners = {
            "prefill": engine.runner,
            "prefill as it comes": DeviceRunner(engine.servable, engine.cache),
        }
        for kind, adapter in (("base", None), ("adapter", 0)):
            for tokens in self.plan.prompts:
                inputs = engine.prompt(adapter, tokens)
                for name, runner in runners.items():
                    seconds = called(partial(runner.forward, inputs), self.device, 3)
                    self.note(name, (kind, tokens), seconds)

    def _deltas(self, engine: Engine) -> None:
        """What adapters add to the linears."""
        linears = Linears(engine, self.plan.layers)
        whole = self.shape.layers / self.plan.layers
        base = {rows: linears.seconds(rows, 0) * whole for rows, _ in self.plan.distinct}
        for rows, distinct in self.plan.distinct:
            added = linears.seconds(rows, distinct) * whole - base[rows]
            floor = distinct * self.adapter_bytes / self.bandwidth
            self.note("deltas", (rows, distinct), added, floor)
            if (rows, distinct) == (32, 32):
                self.at_most("deltas_32_distinct_vs_floor", added / floor, 1.7)
            if (rows, distinct) == (32, 1):
                self.at_most("deltas_one_adapter_share_of_linears", added / base[rows], 0.12)
        rows = self.plan.distinct[0][0]
        attached = [group.deltas for group in linears.groups]
        for group in linears.groups:
            group.deltas = None
        without = linears.seconds(rows, 0) * whole
        for group, deltas in zip(linears.groups, attached, strict=True):
            group.deltas = deltas
        self.note("linears without a pool", (rows,), without)
        self.at_most("deltas_unused_vs_none", base[rows] / without, 1.02)

    def _load(self, engine: Engine) -> None:
        """From the host's memory into pages; the pool is ours, and full of random numbers."""
        for rank in (RANK, self.plan.rank_loaded):
            adapter = _random_adapter(engine, rank)
            side = SideStream(engine.pool.sites, lambda: None)
            engine.pool.copy = side.copy
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                assert engine.pool.admit(adapter)
                while not engine.pool.resident(adapter.generation):
                    time.sleep(1e-4)
                seconds.append(time.perf_counter() - began)
                engine.pool.forget(adapter.generation)
            side.close()
            self.note("load", (rank,), statistics.median(seconds), adapter.nbytes / self.host_bandwidth)

    def _kernels(self, engine: Engine) -> None:
        """Where the main step's time goes."""
        batch = self.plan.main_batch
        for kind, adapters in (("base", [None] * batch), ("distinct", list(range(batch)))):
            for name, seconds in kernel_seconds(engine, adapters, self.plan.context).items():
                self.note("kernel", (kind, name), seconds)

    def batch_invariant(self) -> None:
        """The same step with fixed tiles, which gives a row the same bits in any batch."""
        batch = self.plan.main_batch
        engine = Engine(
            random_llama(self.shape, self.device),
            cuda_kernels(self.device, fixed=True),
            adapters=batch,
            positions=(batch + 1) * (self.plan.context + GROWTH),
            buckets=(batch,),
            fixed=True,
        )
        seconds = decode_seconds(
            engine, list(range(batch)), self.plan.context, self.plan.steps, self.plan.warm_up
        )
        self.note("batch-invariant decode", ("distinct", batch), seconds)
        print(f"batch-invariant: {seconds / self.step_seconds:.2f}x the time of the step without")

    def bitsandbytes(self) -> None:
        """The same step with bitsandbytes' products and a loop over adapters, in a graph too."""
        batch, loop = self.plan.main_batch, Segments()
        loop.rows = [(row, row + 1, row) for row in range(batch)]
        engine = Engine(
            random_llama(self.shape, self.device),
            looping(cuda_kernels(self.device, fixed=False), loop),
            adapters=batch,
            positions=(batch + 1) * (self.plan.context + GROWTH),
            buckets=(batch,),
            backend="bitsandbytes",
        )
        seconds = decode_seconds(
            engine, list(range(batch)), self.plan.context, self.plan.steps, self.plan.warm_up
        )
        self.note("bitsandbytes and a loop", ("distinct", batch), seconds)
        self.at_least(f"decode_{batch}_distinct_vs_bitsandbytes_loop", seconds / self.step_seconds, 3.0)

    def peft(self) -> None:
        """The same step with transformers' generate and peft."""
        batch = self.plan.main_batch
        model = random_llama(self.shape, self.device, attention="sdpa")
        seconds = peft_seconds(model, batch, self.plan.context, self.plan.peft_steps)
        self.note("generate and peft", ("distinct", batch), seconds)
        self.at_least(f"decode_{batch}_distinct_vs_peft", seconds / self.step_seconds, 10.0)

    def upload(self) -> None:
        """The 99th percentile of the time between tokens while an adapter is uploaded and loaded."""
        found = disturbances(
            random_llama(self.shape, self.device),
            cuda_kernels(self.device, fixed=False),
            self.shape,
            rank=self.plan.rank_loaded,
            repeats=self.plan.repeats,
            streams=self.plan.streams,
            tokens=self.plan.quiet_tokens,
        )
        for number, each in enumerate(found):
            shown = {"quiet": each.quiet, "during": each.during} | each.stages
            self.results.add(
                name="upload", case=[number], seconds=round(each.seconds, 4),
                **{stage: asdict(gaps) for stage, gaps in shown.items()},
            )  # fmt: skip
            said = (
                f"{stage} {gaps.median * 1e3:.2f} and {gaps.p99 * 1e3:.2f} ms ({gaps.tokens})"
                for stage, gaps in shown.items()
            )
            print(f"upload {number}, median and p99 between tokens (how many): {', '.join(said)}")
        moved = statistics.median(each.during.p99 / each.quiet.p99 - 1 for each in found)
        self.at_most("upload_moves_p99_itl_by", moved, 0.05)
        self.at_least("upload_tokens_timed", min(each.during.tokens for each in found), 1000)

    def run(self) -> int:
        """Every part, whatever becomes of the others."""
        parts: list[Callable[[], None]] = [
            self.memory, self.products, self.attention, self.engine, self.upload, self.bitsandbytes,
            self.batch_invariant, self.peft,
        ]  # fmt: skip
        started = time.perf_counter()
        for part in parts:
            began = time.perf_counter()
            try:
                if began - started > self.plan.most_seconds:
                    raise TimeoutError(f"{part.__name__} was not begun: {self.plan.most_seconds} s are over")
                wake(self.device)
                part()
            except Exception:
                traceback.print_exc()
                self.at_least(f"{part.__name__}_ran", 0, 1)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            print(f"{part.__name__} took {time.perf_counter() - began:.0f} s", flush=True)
        return self.results.close(self.figures)


def _random_adapter(engine: Engine, rank: int) -> Adapter:
    deltas = [
        Delta(
            index,
            position,
            torch.randn(rank, site.in_features).bfloat16(),
            torch.randn(rank, member.out_features).bfloat16(),
            1.0,
        )
        for index, site in enumerate(engine.servable.layout.sites)
        for position, member in enumerate(site.members)
    ]
    return Adapter(f"loaded-{rank}", tuple(deltas))


def _gpu_name(device: torch.device) -> str:
    """ "h200" of "NVIDIA H200", "h100" of "NVIDIA H100 80GB HBM3"."""
    if device.type != "cuda":
        return "cpu"
    words = torch.cuda.get_device_name(device).lower().replace("nvidia", "").split()
    return words[0] if words else "gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; nothing is kept")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.manual_seed(SEED)
    with ExitStack() as stack:
        if options.dry_run:
            from tests.fake_cuda import fake_device

            stack.enter_context(fake_device())
            kept = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(patch.object(figures, "RESULTS", Path(kept)))
            plan = dry()
        elif not torch.cuda.is_available():
            print("no CUDA device answers here: run this on a machine with an NVIDIA GPU", file=sys.stderr)
            return 1
        else:
            plan = full(torch.device("cuda", torch.cuda.current_device()))
        card = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "no GPU"
        where = f"{card} in a machine of {os.cpu_count()} cores"
        out = os.environ.get("OUT")
        results = Results(
            f"{_gpu_name(plan.device)}-bench", "make gpu-bench", SEED, where, Path(out) if out else None
        )
        if plan.device.type == "cuda":
            results.add(name="gpu", gpu=card, torch=torch.__version__)
        return Bench(plan, results).run()


if __name__ == "__main__":
    sys.exit(main())
