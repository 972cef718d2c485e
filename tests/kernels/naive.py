"""Every operation as its formula says it, token by token in float64; and the data that the tests feed to both."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels.segments import Segment, Span

PAGE_RANK = 16


@dataclass
class DeltaStep:
    """One site of a pool whose other pages are NaN, and the rows that read it."""

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    scale: Tensor
    widths: tuple[int, ...]
    segments: tuple[Segment, ...]

    def naive(self) -> Tensor:
        return add_deltas(self.y, self.x, self.a, self.b, self.scale, self.widths, self.segments)

    def twins(self) -> Tensor:
        """By the operations of `kernels/reference.py`."""
        y = self.y.clone()
        for segment in self.segments:
            v = reference.shrink(self.x, self.a, self.scale, segment)
            reference.expand(y, v, self.b, self.widths, segment)
        return y


def add_deltas(
    y: Tensor,  # [rows, sum of widths]
    x: Tensor,  # [rows, in]
    a: Tensor,  # [pages, members, page rank, in]
    b: Tensor,  # [pages, page rank, sum of widths]
    scale: Tensor,  # [pages, members]
    widths: tuple[int, ...],
    segments: tuple[Segment, ...],
) -> Tensor:  # [rows, sum of widths] float64
    out = y.double().clone()
    for segment in segments:
        for row in range(segment.start, segment.end):
            for page, weight in zip(segment.pages, segment.weights, strict=True):
                first = 0
                for member, width in enumerate(widths):
                    hidden = a[page, member].double() @ x[row].double()
                    delta = hidden @ b[page, :, first : first + width].double()
                    out[row, first : first + width] += weight * float(scale[page, member]) * delta
                    first += width
    return out


def attention(
    q: Tensor,  # [rows, query heads, k width]
    k_cache: Tensor,  # [positions, kv heads, k width]
    v_cache: Tensor,  # [positions, kv heads, v width]
    spans: tuple[Span, ...],
    block_size: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # [rows, query heads, v width] float64
    out = torch.zeros(*q.shape[:2], v_cache.shape[2], dtype=torch.float64, device=q.device)
    group = q.shape[1] // k_cache.shape[1]
    for span in spans:
        count = span.end - span.start
        where = [span.blocks[p // block_size] * block_size + p % block_size for p in range(span.kv_length)]
        keys, values = k_cache[where].double(), v_cache[where].double()
        for i in range(count):
            at = span.kv_length - count + i
            first = 0 if window is None else max(0, at - window + 1)
            for head in range(q.shape[1]):
                scores = keys[first : at + 1, head // group] @ q[span.start + i, head].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1].double()])
                weights = torch.softmax(scores, dim=0)[: at + 1 - first]
                out[span.start + i, head] = weights @ values[first : at + 1, head // group]
    return out


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude of `want`; NaN in `got` is never small.

    A GPU adds float32 in orders that round a few times more than the CPU's: a quarter of their difference counts.
    """
    error = (got.double() - want).abs().max() / want.abs().max()
    if got.is_cuda and got.dtype is torch.float32:
        error = error / 4
    return float("inf") if error.isnan() else float(error)
