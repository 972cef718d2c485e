"""What NF4 products are tested with, on the CPU and on a GPU: random weights, and rows that read adapters' pages."""

import numpy as np
import torch
from torch import Tensor

from kernels import lora, nf4, reference
from kernels.lora import Deltas
from kernels.nf4 import linear
from kernels.nf4_decode import NF4Weight
from kernels.plans import DeltaPlan
from kernels.segments import Segment, segments_of
from tests.kernels.naive import PAGE_RANK, add_deltas

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}


def weight_of(
    out: int, width: int, device: str = "cpu"
) -> tuple[NF4Weight, Tensor]:  # and its values in float64
    packed = torch.randint(0, 256, (out * width // 2, 1), dtype=torch.uint8, device=device)
    absmax = torch.rand(out * width // 64, device=device) + 0.05
    weight = NF4Weight.of(packed, absmax, (out, width))
    return weight, reference.dequantize_nf4(packed, absmax, weight.code, (out, width)).double()


class Adapted:
    """A weight of sibling members, a pool of pages, and rows that read them."""

    def __init__(self, rows, widths, width, dtype, *, fixed=False, device="cpu"):
        self.widths, self.fixed = widths, fixed
        self.weight, self.exact = weight_of(sum(widths), width, device)
        self.x = torch.randn(sum(count for count, _, _ in rows), width, device=device).to(dtype)
        self.a = (torch.randn(7, len(widths), PAGE_RANK, width, device=device) / 8).to(dtype)
        self.b = torch.randn(7, PAGE_RANK, sum(widths), device=device).to(dtype)
        self.scale = torch.rand(7, len(widths), device=device) + 0.5
        self.segments = segments_of(rows)

    def naive(self) -> Tensor:
        base = self.x.double() @ self.exact.T
        return add_deltas(base, self.x, self.a, self.b, self.scale, self.widths, self.segments)

    def ours(self, workspace, first=0, end=None, tile=None, *, apart=False) -> Tensor:
        """Rows `first:end` alone, by `linear` or with one tile; `apart`: by a launch of shrink's own before it."""
        x = self.x[first:end].contiguous()
        deltas = Deltas(self.a, self.b, self.scale, self.widths, self.plan(first, first + len(x)))
        if tile is None:
            return linear(x, self.weight, None, workspace, fixed=self.fixed, deltas=deltas)
        y, span = x.new_empty(len(x), sum(self.widths)), (0, len(x))
        given = {"deltas": deltas, "lanes": tile.splits}
        if apart:
            given["v"] = lora.shrink(x, deltas, workspace, fixed=self.fixed)
        nf4.launch(y, x, self.weight, None, workspace, tile, span, **given)
        return y

    def plan(self, first: int, end: int) -> DeltaPlan:
        cut = [
            Segment(max(s.start, first) - first, min(s.end, end) - first, s.pages, s.weights)
            for s in self.segments
            if s.start < end and s.end > first
        ]
        most = max((len(segment.pages) for segment in cut), default=1)
        table = np.zeros(DeltaPlan.sizes(end - first, most), np.int32)
        used = DeltaPlan.fill(table, cut, end - first, fixed=self.fixed)
        return DeltaPlan.view(
            torch.from_numpy(table).to(self.x.device), end - first, most, used=used, fixed=self.fixed
        )


ROWS = [
    (3, (4, 1), (1.0, 0.5)),
    (2, (), ()),
    (17, (5,), (1.0,)),
    (1, (0, 6, 2), (0.25, 0.5, 0.25)),
    (1, (), ()),
    (4, (5,), (1.0,)),
]
