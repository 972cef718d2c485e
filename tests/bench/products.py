"""Times the base's product alone: the compiled kernels, bitsandbytes' module as it stands, dequantize and multiply.

    python -m tests.bench.products [--threads 2] [--isa avx2]

In turn, medians, in milliseconds; more copies of the weights than caches hold. `ratio` is the better bitsandbytes over
ours, `floor` ours over the time in which memory delivers the packed weights. One thread is timed by its own CPU time,
which other processes on the machine disturb less.
"""

import argparse
import statistics

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from kernels.cpu.library import load
from server.heap import keep_large_blocks
from server.model.linear import FourBitLinear, PackedLinear
from tests.bench.timing import read_bandwidth, seconds

SHAPES = [(8192, 2048), (2048, 8192)]
ROWS = [1, 4, 16, 64, 256]
COPIES = 12  # about 100 MB


def module(out: int, inside: int, dtype: torch.dtype) -> Linear4bit:
    held = Linear4bit(
        inside, out, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=dtype
    )
    held.load_state_dict(nn.Linear(inside, out, bias=False).state_dict())
    return held.to("cpu").eval()


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
    heads = ["ours", "bnb f32", "bnb bf16", "plain"]
    print(f"{'out x in':>14} {'rows':>4} " + " ".join(f"{head:>8}" for head in heads) + "  ratio  floor")
    for out, inside in SHAPES:
        first = module(out, inside, torch.float32)
        ours = [PackedLinear.of([first], library) for _ in range(COPIES)]
        plain = FourBitLinear.of([module(out, inside, torch.float32)], torch.float32)
        halves = module(out, inside, torch.bfloat16)
        for rows in ROWS:
            x = torch.randn(rows, inside)
            contenders = [lambda x: None, first, lambda x: halves(x.bfloat16()), plain]  # noqa: B023
            times: list[list[float]] = [[] for _ in contenders]
            for turn in range(COPIES if rows < 64 else 5):
                contenders[0] = ours[turn % COPIES]
                for index, contender in enumerate(contenders):
                    if index == 0 or turn < 5:
                        times[index].append(seconds(contender, x))
            middle = [statistics.median(each) * 1e3 for each in times]
            floor = ours[0].weight.data.numel() / speed * 1e3
            ratio, times_floor = min(middle[1:3]) / middle[0], middle[0] / floor
            print(
                f"{out:>6} x {inside:<5} {rows:>4} "
                + " ".join(f"{value:8.2f}" for value in middle)
                + f" {ratio:5.1f}x {times_floor:5.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
