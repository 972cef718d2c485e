"""Chooses each sequence's next token from its logits, and says how likely the model found it.

In this order, which is vLLM's: logprobs are taken from the model's own logits; `logit_bias` is added; ends are
forbidden before `min_tokens`; the mask is added; the repetition penalty divides positive logits and multiplies negative
ones, for tokens of prompt and output; from each token of the output the frequency penalty is subtracted as often as the
token stands there, and the presence penalty once. Greedy takes the largest. Otherwise logits are divided by the
temperature; `min_p`, `top_k` and `top_p` each forbid tokens of what the one before left; and one is drawn.

Draws are counter-based: the noise of a token is a hash of (seed, output position, token id). That and the penalties are
functions of the sequence's own tokens, so that a seed gives the same text in any batch, on any device and after a
preemption. Knows nothing of scheduling or text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, cuda

from server.engine.sequence import Logprobs, Sequence

_LEAST = 1e-30  # that logits are divided by: what is smaller is 0 in float32
_ONE = 2.0**50  # a probability of 1 in whole numbers: sums of a row are exact, as int64 and as float64
_RANKED_ROWS = 32  # of which the likeliest are found at once: int64 keys take twice the room of logits


@dataclass(frozen=True, slots=True)
class Pick:
    """A row's token, and its logprobs if they were asked for."""

    token_id: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """A row of a prompt: the token that follows it, and how many of the likeliest are asked for."""

    token_id: int
    top: int


@dataclass(slots=True)
class Drawn:
    """A step's tokens and logprobs on their way to the host: packed, and the event after which they are there."""

    host: Tensor  # [rows] int64, or float64 with the logprobs that were asked for behind them
    arrived: cuda.Event | None
    tops: list[int | None]  # of each row, how many of the likeliest were asked for
    most: int
    _token_ids: list[int] | None = None

    def token_ids(self) -> list[int]:
        """Each row's token, or -1. A step's one wait; who waits holds no lock of Python's, so that others go on."""
        if self._token_ids is None:
            if self.arrived is not None:
                self.arrived.synchronize()
            # by numpy: torch's own views and conversions would let the lock go once more
            self._token_ids = self.host.numpy()[: len(self.tops)].astype(np.int64).tolist()
        return self._token_ids

    def picks(self) -> list[Pick | None]:
        """Each row's token and logprobs; None where its logits are not numbers or every token is forbidden."""
        tokens = self.token_ids()
        picks = [None if token < 0 else Pick(token) for token in tokens]
        asked = [row for row, top in enumerate(self.tops) if top is not None]
        reports = self.host[len(self.tops) :].view(len(asked), -1).tolist() if asked else []
        for row, (logprob, *likeliest) in zip(asked, reports, strict=True):
            if picks[row] is not None:
                top = zip(map(int, likeliest[: self.most]), likeliest[self.most :], strict=True)
                picks[row] = Pick(tokens[row], Logprobs(logprob, tuple(top)[: self.tops[row]]))
        return picks


@torch.inference_mode()
def draw(
    logits: Tensor,  # [sequences + known, vocabulary] float32
    sequences: Rows[Sequence],  # whose next token is chosen: the first rows
    known: Rows[Known] = (),  # the rows after them
    mask: Tensor | None = None,  # [sequences, vocabulary] added: 0 or -inf
) -> Drawn:
    """Each row's token, and its logprobs where they are asked for. Waits for nothing."""
    own = logits[: len(sequences)]
    shaped = _shape(own, sequences, mask)
    chosen = shaped.argmax(dim=-1)
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    if drawn:
        rows = _on(logits.device, drawn, torch.int64)
        chosen[rows] = _draw(shaped[rows], [sequences[row] for row in drawn])
    usable = torch.isfinite(logits.amax(dim=-1))
    if shaped is not own:
        usable[: len(sequences)] &= torch.isfinite(shaped.amax(dim=-1))
    if known:
        chosen = torch.cat((chosen, _on(logits.device, [row.token_id for row in known], torch.int64)))
    chosen = torch.where(usable, chosen, -1)
    tops = [sequence.sampling.logprobs for sequence in sequences] + [row.top for row in known]
    return _send_back(logits, chosen, tops)


def _on(device: torch.device, values: Any, dtype: torch.dtype) -> Tensor:
    """Numbers on the device, without waiting for what runs there: a GPU fetches them from pinned memory."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _send_back(logits: Tensor, chosen: Tensor, tops: list[int | None]) -> Drawn:
    """Tokens and the logprobs asked for in one copy; float64 holds ids and float32 exactly."""
    asked = [row for row, top in enumerate(tops) if top is not None]
    found, most = chosen, 0
    if asked:
        most = min(max(tops[row] or 0 for row in asked), logits.shape[1])
        rows = _on(logits.device, asked, torch.int64)
        found = torch.cat((chosen.double(), _report(logits[rows], chosen[rows], most).flatten()))
    if found.device.type != "cuda":
        return Drawn(found, None, tops, most)
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    host.copy_(found, non_blocking=True)
    arrived = cuda.Event()
    arrived.record()
    return Drawn(host, arrived, tops, most)


def _report(logits: Tensor, tokens: Tensor, top: int) -> Tensor:  # [rows, 1 + 2 * top] float64
    """Each row's logprob of its token, then the `top` likeliest ids, then their logprobs."""
    logprobs = logits.log_softmax(dim=-1)
    found = [logprobs.gather(1, tokens.clamp(min=0)[:, None]).double()]
    if top:
        ids = torch.cat([_likeliest(part, top) for part in torch.split(logits, _RANKED_ROWS)])
        found += [ids.double(), logprobs.gather(1, ids).double()]
    return torch.cat(found, dim=1)


def _likeliest(logits: Tensor, count: int) -> Tensor:  # [rows, count] int64
    """The ids of the largest logits; of equal ones the lower ids first, which topk alone does not promise.

    A float's bits, read as an integer and turned round where negative, are in the floats' order.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = bits.long()
    keys <<= 32
    keys -= torch.arange(logits.shape[1], device=logits.device)
    return keys.topk(count, dim=-1).indices


def _shape(logits: Tensor, sequences: Rows[Sequence], mask: Tensor | None) -> Tensor:
    """Logits as bias, ends, mask and penalties make them; `logits` itself where nobody asks for any."""
    asked = [s.sampling for s in sequences]
    bias = [(row, id, value) for row, sampling in enumerate(asked) for id, value in sampling.logit_bias]
    ends = [
        (row, id)
        for row, (s, sampling) in enumerate(zip(sequences, asked, strict=True))
        if s.output_length < sampling.min_tokens
        for id in sampling.stop_token_ids
    ]
    penalties = [_penalties(row, s) for row, s in enumerate(sequences) if _is_penalized(s)]
    if not bias and not ends and not penalties:
        return logits if mask is None else logits + mask
    logits = logits.clone()
    if bias:
        rows, ids, values = _on(logits.device, bias, torch.float64).unbind(1)
        at = (rows.long(), ids.long())
        logits[at] = logits[at] + values.float()
    if ends:
        rows, ids = _on(logits.device, ends, torch.int64).unbind(1)
        logits[rows, ids] = float("-inf")
    if mask is not None:
        logits += mask
    if penalties:
        _penalize(logits, np.concatenate(penalties, axis=1))
    return logits


def _is_penalized(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    output_only = sampling.presence_penalty or sampling.frequency_penalty
    return sampling.repetition_penalty != 1 or bool(output_only and sequence.output_length)


def _penalties(row: int, sequence: Sequence) -> NDArray[np.float64]:  # [6, tokens]
    """Row, id, repetition and frequency penalty, count, presence penalty of each distinct token that is penalized."""
    sampling = sequence.sampling
    output = np.asarray(sequence.tokens[sequence.prompt_length :], dtype=np.int64)
    ids, counts = np.unique(output, return_counts=True)
    if sampling.repetition_penalty != 1:
        unsaid = np.setdiff1d(sequence.prompt_ids(), ids, assume_unique=True)
        ids, counts = np.concatenate((ids, unsaid)), np.concatenate((counts, np.zeros_like(unsaid)))
    least = max(sampling.repetition_penalty, _LEAST)
    each = [row, least, sampling.frequency_penalty, sampling.presence_penalty]
    rows, repetition, frequency, presence = np.broadcast_to(np.array(each)[:, None], (4, len(ids)))
    return np.stack((rows, ids, repetition, frequency, counts, presence))


def _penalize(logits: Tensor, penalties: NDArray[np.float64]) -> None:
    """In place: each (row, id) stands in `penalties` once."""
    rows, ids, *others = _on(logits.device, penalties, torch.float64)
    at = (rows.long(), ids.long())
    repetition, frequency, counts, presence = (each.float() for each in others)
    values = logits[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts
    logits[at] = values - presence * (counts > 0)


def _draw(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """Gumbel-max: the largest of log-probability plus noise is a draw from the distribution (Gumbel 1954)."""

    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return _on(logits.device, list(values), dtype)[:, None]

    temperatures = [max(s.sampling.temperature, _LEAST) for s in sequences]
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / column(temperatures, torch.float32)
    min_p = [s.sampling.min_p for s in sequences]
    if max(min_p) > 0:
        # the likeliest is at 0, so the bound on a probability's share of its is one on `scaled`
        least = column((math.log(p) if p else -math.inf for p in min_p), torch.float32)
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    top_k = [min(s.sampling.top_k or logits.shape[1], logits.shape[1]) for s in sequences]
    top_p = [s.sampling.top_p for s in sequences]
    if min(top_k) < logits.shape[1] or min(top_p) < 1:
        scaled = _keep_top(scaled, column(top_k, torch.int64), column(top_p, torch.float32))
    seeds = column((_signed(s.sampling.seed) for s in sequences), torch.int64)
    positions = column((s.output_length for s in sequences), torch.int64)
    uniform = _uniform(seeds, positions, torch.arange(logits.shape[1], device=logits.device)[None])
    return (scaled.double() - torch.log(-torch.log(uniform))).argmax(dim=-1)


def _keep_top(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the k most likely tokens and outside the smallest set whose probability reaches p."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    kept = rank < top_k
    probability = torch.softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1)
    # whole numbers: a GPU sums floats in an order that may be another each time, and then to another sum
    units = (probability.double() * _ONE).long()
    before = units.cumsum(dim=-1) - units
    kept &= (before < top_p.double() * _ONE) | (top_p >= 1)  # what was rounded may reach 1 too early
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
