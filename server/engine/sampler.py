"""Chooses each sequence's next token from its logits.

Draws are counter-based: the noise of a token is a hash of (seed, output position, token id), so that a seed gives the
same text in any batch, on any device and after a preemption. Knows nothing of scheduling or text.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from server.engine.sequence import Sequence

_LEAST_TEMPERATURE = 1e-30  # greedy by any measure; what is smaller is 0 in float32


def sample(
    logits: Tensor,  # [rows, vocabulary] float32
    sequences: Rows[Sequence],  # one per row
) -> list[int | None]:
    """The next token of each row; None where a row's logits are not numbers."""
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen[rows] = _draw(logits[rows], [sequences[row] for row in drawn])
    broken = ~torch.isfinite(logits.amax(dim=-1))
    picked: list[int] = torch.where(broken, -1, chosen).tolist()
    return [None if token < 0 else token for token in picked]


def _draw(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """Gumbel-max: the largest of log-probability plus noise is a draw from the distribution (Gumbel 1954)."""

    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=logits.device)[:, None]

    temperatures = [max(s.sampling.temperature, _LEAST_TEMPERATURE) for s in sequences]
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / column(temperatures, torch.float32)
    top_k = [s.sampling.top_k or logits.shape[1] for s in sequences]
    top_p = [s.sampling.top_p for s in sequences]
    if min(top_k) < logits.shape[1] or min(top_p) < 1:
        scaled = _keep_top(scaled, column(top_k, torch.int64), column(top_p, torch.float32))
    seeds = torch.tensor([_signed(s.sampling.seed) for s in sequences], device=logits.device)[:, None]
    positions = torch.tensor([s.output_length for s in sequences], device=logits.device)[:, None]
    uniform = _uniform(seeds, positions, torch.arange(logits.shape[1], device=logits.device)[None])
    return (scaled.double() - torch.log(-torch.log(uniform))).argmax(dim=-1)


def _keep_top(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the k most likely tokens and outside the smallest set whose probability reaches p."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    kept = rank < top_k
    probability = torch.softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1)
    before = probability.cumsum(dim=-1) - probability
    kept &= (before < top_p) | (top_p >= 1)  # a rounded sum reaches 1 too early
    return torch.full_like(scaled, float("-inf")).scatter(1, order, ordered.masked_fill(~kept, float("-inf")))


def _uniform(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """A float64 in (0, 1) per (seed, position, token): the finalizer of splitmix64 over their combination."""
    mixed = _mix(_mix(seed + _signed(0x9E3779B97F4A7C15)) ^ position)
    bits = _mix(mixed ^ (token * _signed(0xD1B54A32D192ED03)))
    return (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) / (1 << 52)


def _mix(x: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea, Flood 2014) in wrapping int64; shifts are made logical by masking."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    """The 64 low bits as a signed integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
