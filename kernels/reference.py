"""Every operation in plain PyTorch: the oracle of the fast kernels, and the fall-back wherever none is built.

Products of rows are made in multiples of `ROW_TILE` rows and sums over keys in fixed tiles, so that on the CPU a row's
result is the same bits alone and among neighbours (a BLAS picks another summation order for 1 row than for 16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.segments import KV_TILE, Segment, Spans

ROW_TILE = 16
_LEAST_SCALE = 1e-30  # of a quantized row: small beside any row's, large enough that its reciprocal is finite
_FAR_BELOW = -1e30  # a running maximum to start from: finite, so that a wholly masked tile adds exact zeros


def pad_rows(
    x: Tensor,  # [..., rows, width]
) -> Tensor:
    """Zero rows up to the next multiple of `ROW_TILE`."""
    missing = -x.shape[-2] % ROW_TILE
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def linear(
    x: Tensor,  # [rows, in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
) -> Tensor:  # [rows, out]
    """`y = x @ weight.T + bias`."""
    return F.linear(pad_rows(x), weight, bias)[: x.shape[0]]


def dequantize_nf4(
    packed: Tensor,  # [out * in / 2] uint8, high nibble first
    absmax: Tensor,  # [out * in / block] float32
    code: Tensor,  # [16] float32
    shape: tuple[int, int],  # (out, in)
    block: int = 64,
) -> Tensor:  # [out, in] float32
    """`w[i] = code[nibble[i]] * absmax[i // block]`, the format of bitsandbytes (Dettmers et al. 2023, QLoRA)."""
    flat = packed.flatten().int()
    values = torch.stack((code[flat >> 4], code[flat & 15]), dim=1).flatten()[: shape[0] * shape[1]]
    return (values * absmax.repeat_interleave(block)[: values.numel()]).view(shape)


def nf4_int8_linear(
    x: Tensor,  # [rows, in]
    packed: Tensor,  # [out * in / 2] uint8, high nibble first
    absmax: Tensor,  # [out * in / 64] float32
    code: Tensor,  # [16] float32
    shape: tuple[int, int],  # (out, in)
) -> Tensor:  # [rows, out] float32
    """`y = x @ w.T` with the values of x, by row and block of 64, and the sixteen of NF4 rounded to 8 bits.

    Sums within a block are exact integers; across blocks they are floats.
    """
    blocks = x.float().view(len(x), -1, 64)
    largest = blocks.abs().amax(dim=2, keepdim=True)
    values = (blocks * (127 / largest.clamp_min(_LEAST_SCALE))).round()
    flat = packed.flatten().int()
    rounded = (code * 127).round()
    weight = torch.stack((rounded[flat >> 4], rounded[flat & 15]), dim=1).view(shape[0], -1, 64)
    sums = torch.einsum("rbk,nbk->rnb", values.double(), weight.double()).float()
    scaled = sums * (largest.squeeze(2) / 127**2)[:, None] * absmax.view(1, shape[0], -1)
    result: Tensor = scaled.sum(dim=2)
    return result


def int8_linear(
    x: Tensor,  # [rows, in]
    weight: Tensor,  # [out, in] int8
    absmax: Tensor,  # [out] float32, the row's largest magnitude before quantization
    bias: Tensor | None,  # [out]
) -> Tensor:  # [rows, out]
    """LLM.int8() without outlier columns (Dettmers et al. 2022): rows of x to int8 by their own largest magnitude."""
    rows = pad_rows(x).float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(_LEAST_SCALE)
    quantized = (rows * (127.0 / scale)).round()
    y = F.linear(quantized, weight.float()) * (scale / 127.0) * (absmax / 127.0)
    y = y[: x.shape[0]].to(x.dtype)
    return y if bias is None else y + bias


def shrink(
    x: Tensor,  # [rows, in]
    a: Tensor,  # [pages, members, page rank, in]
    scale: Tensor,  # [pages, members] float32
    segment: Segment,
) -> Tensor:  # [segment rows, members, segment pages * page rank]
    """`v[t, m] = x[t] @ a[pages, m].T`, each page's part times its scale and weight (hidden -> rank).

    Source: Chen et al. 2023 (Punica) for shrink and expand; Sheng et al. 2023 (S-LoRA) for pages.
    """
    pages, members, page_rank = len(segment.pages), a.shape[1], a.shape[2]
    factors = _take(a, segment.pages).flatten(0, 2)
    rows = x[segment.start : segment.end].to(a.dtype)
    v = linear(rows, factors, None).float().view(len(rows), pages, members, page_rank)
    weights = torch.tensor(segment.weights, dtype=torch.float32, device=x.device)
    v = v * (_take(scale, segment.pages) * weights[:, None])[:, :, None]
    return v.transpose(1, 2).flatten(2)


def expand(
    y: Tensor,  # [rows, sum of widths], written
    v: Tensor,  # [segment rows, members, segment pages * page rank]
    b: Tensor,  # [pages, page rank, sum of widths]
    widths: tuple[int, ...],  # one per member
    segment: Segment,
) -> None:
    """`y[t, member m's columns] += v[t, m] @ b[pages][:, those columns]` (rank -> hidden)."""
    factors = _take(b, segment.pages).flatten(0, 1)
    out = y[segment.start : segment.end]
    column = 0
    for member, width in enumerate(widths):
        columns = slice(column, column + width)
        rows = pad_rows(v[:, member].to(b.dtype))
        out[:, columns] += (rows @ factors[:, columns])[: v.shape[0]].to(y.dtype)
        column += width


def rms_norm(
    x: Tensor,  # [..., width]
    weight: Tensor,  # [width]
    epsilon: float,
) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + epsilon)` (Zhang and Sennrich 2019), rounded once."""
    values = x.float()
    return (weight.float() * values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)).to(
        x.dtype
    )


def gate(
    activation: Literal["silu", "gelu_tanh"],
    x: Tensor,  # [..., width]
    up: Tensor | None = None,  # the same shape
) -> Tensor:
    """`activation(x) * up`, or the activation alone, rounded once."""
    values = x.float()
    activated = F.silu(values) if activation == "silu" else F.gelu(values, approximate="tanh")
    return (activated if up is None else activated * up.float()).to(x.dtype)


def rotate(
    x: Tensor,  # [rows, heads, width]
    cos: Tensor,  # [rows, width]
    sin: Tensor,  # [rows, width]
) -> Tensor:  # [rows, heads, width]
    """`x * cos + rotate_half(x) * sin` (Su et al. 2021, RoPE), rounded once."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos.float()[:, None] + turned * sin.float()[:, None]).to(x.dtype)


def write_kv(
    cache: Tensor,  # [positions, heads, width], written
    rows: Tensor,  # [tokens, heads, width]
    kv_index: Tensor,  # [tokens] int64
) -> None:
    """`cache[kv_index[t]] = rows[t]`."""
    cache.index_copy_(0, kv_index, rows.to(cache.dtype))


def attention(
    q: Tensor,  # [rows, query heads, k width]
    k_cache: Tensor,  # [positions, kv heads, k width]
    v_cache: Tensor,  # [positions, kv heads, v width]
    spans: Spans,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,  # [query heads]
) -> Tensor:  # [rows, query heads, v width]
    """Causal attention of every span over its own blocks, with grouped queries and a running softmax over tiles.

    Query i of a span sees key k iff k <= i and, with a window w, k > i - w; `softcap * tanh(s / softcap)` bounds the
    scores (Gemma 2); sinks take part in the softmax without a value (gpt-oss). Rows of no span come back as zeros.
    Source: Dao et al. 2022 for the running softmax, Kwon et al. 2023 for paging.
    """
    out = torch.zeros(*q.shape[:2], v_cache.shape[2], dtype=q.dtype, device=q.device)
    for index, span in enumerate(spans.spans):
        queries = _Queries.of(q[span.start : span.end], k_cache.shape[1], span.kv_length, window)
        state = queries.start(v_cache.shape[2], sinks)
        for tile in range(queries.first_visible // KV_TILE, -(-span.kv_length // KV_TILE)):
            where = spans.tile(index, tile)
            keys, values = k_cache[where].transpose(0, 1), v_cache[where].transpose(0, 1)
            inside = span.kv_length - tile * KV_TILE
            if inside < KV_TILE:  # what lies past the span's end is another's, and may be anything
                values = F.pad(values[:, :inside], (0, 0, 0, KV_TILE - inside))
            state = queries.add_tile(state, keys, values, tile * KV_TILE, scale, softcap)
        out[span.start : span.end] = queries.finish(state).to(out.dtype)
    return out


# running maximum and total [heads, rows, 1], weighted sum [heads, rows, width]
_State = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Queries:
    """One span's queries as [kv heads, padded rows, width], row `i * group + g` being query i of head g of a group."""

    rows: Tensor
    at: Tensor  # [padded rows] the key position of each row
    count: int
    group: int
    window: int | None

    @classmethod
    def of(cls, q: Tensor, kv_heads: int, kv_length: int, window: int | None) -> _Queries:
        count, heads, width = q.shape
        group = heads // kv_heads
        rows = pad_rows(q.view(count, kv_heads, group, width).transpose(0, 1).flatten(1, 2))
        at = torch.arange(kv_length - count, kv_length, device=q.device).repeat_interleave(group)
        return cls(rows, F.pad(at, (0, rows.shape[1] - len(at)), value=kv_length - 1), count, group, window)

    @property
    def first_visible(self) -> int:
        return 0 if self.window is None else max(0, int(self.at[0]) - self.window + 1)

    def start(self, width: int, sinks: Tensor | None) -> _State:
        heads, padded, _ = self.rows.shape
        summed = self.rows.new_zeros(heads, padded, width, dtype=torch.float32)
        if sinks is None:
            highest = summed.new_full((heads, padded, 1), _FAR_BELOW)
            return highest, torch.zeros_like(highest), summed
        by_row = sinks.float().view(heads, 1, -1).expand(heads, self.count, -1).reshape(heads, -1, 1)
        highest = pad_rows(by_row)
        return highest, torch.ones_like(highest), summed

    def add_tile(
        self,
        state: _State,
        keys: Tensor,  # [kv heads, KV_TILE, k width]
        values: Tensor,  # [kv heads, KV_TILE, v width]
        first_key: int,
        scale: float,
        softcap: float | None,
    ) -> _State:
        highest, total, summed = state
        scores = torch.bmm(self.rows, keys.to(self.rows.dtype).transpose(1, 2)).float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        key = torch.arange(first_key, first_key + KV_TILE, device=scores.device)
        hidden = key > self.at[:, None]
        if self.window is not None:
            hidden |= key <= self.at[:, None] - self.window
        scores = scores.masked_fill(hidden, float("-inf"))
        new_highest = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        kept = torch.exp(highest - new_highest)
        weights = torch.exp(scores - new_highest)
        total = total * kept + weights.sum(dim=-1, keepdim=True)
        summed = summed * kept + torch.bmm(weights.to(self.rows.dtype), values.to(self.rows.dtype)).float()
        return new_highest, total, summed

    def finish(self, state: _State) -> Tensor:  # [count, query heads, v width]
        _, total, summed = state
        result = (summed / total)[:, : self.count * self.group]
        return result.view(len(result), self.count, self.group, -1).transpose(0, 1).flatten(1, 2)


def _take(pages: Tensor, ids: tuple[int, ...]) -> Tensor:
    """The pages with these ids: a view where they lie side by side."""
    if ids == tuple(range(ids[0], ids[0] + len(ids))):
        return pages[ids[0] : ids[0] + len(ids)]
    return pages[torch.tensor(ids, device=pages.device)]
