"""Attention over paged keys and values on a GPU: decodes and chunks of prompts in one launch.

A program takes a tile of queries of one span with the heads that share a key head, over all its keys or, where a text
is long beside others, over a share of them; shares are put together by whoever ends last, in their order. All products
are 16 x 8 matrix instructions, which sum a row in one way whatever the tile's height; the wide ones of Hopper would
read weights from registers, which the assembler of Triton 3.6 can get wrong. Knows nothing of scheduling: tiles, shares
and blocks come from `kernels/plans.py`.

torch's own `varlen_attn` with a block table knows neither softcap nor sinks; one kernel here serves every model. The
two have not been timed against each other.

Source: Dao et al. 2022 for the running softmax, Dao et al. 2023 (Flash-Decoding) for parts, Kwon et al. 2023 for pages.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels import plans, portable
from kernels.plans import AttentionPlan
from kernels.workspace import Workspace

HEAD = tl.constexpr(plans.ATTENTION_HEAD)
RECORD = tl.constexpr(plans.ATTENTION_RECORD)
# a maximum to start from: finite, so that a tile of hidden keys adds exact zeros
_FAR_BELOW = tl.constexpr(-1e30)

_LEAST_SHARE = tl.constexpr(plans.LEAST_SHARE)
# By bytes of a number, then by width of a head, up to: keys of one turn of the loop, warps, turns in flight; so that no
# kernel spills, nor float32's need more shared memory than every chip has.
_TURNS = {
    2: {64: (128, 4, 3), 128: (64, 4, 3), 256: (32, 8, 2), 512: (32, 8, 2)},
    4: {64: (32, 8, 2), 128: (32, 8, 2), 256: (16, 8, 2), 512: (16, 8, 1)},
}
_LOW_TURNS = {2: _TURNS[2] | {128: (128, 4, 2)}, 4: _TURNS[4] | {64: (32, 4, 2)}}  # of tiles of 16 rows


@triton.jit(do_not_specialize=["room"])
def _attention_kernel(
    out: tl.tensor,
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    sinks: tl.tensor,
    plan: tl.tensor,
    planes: tl.tensor,
    counters: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    q_row: tl.tensor,  # strides of q
    q_head: tl.tensor,
    room: tl.tensor,  # for records, of the plan
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    HEADS: tl.constexpr,  # of them in a tile
    QUERIES: tl.constexpr,  # of a tile, at most
    HEIGHT: tl.constexpr,  # rows of a tile, at least QUERIES * HEADS
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_ROOM: tl.constexpr,  # powers of two
    V_ROOM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,  # of one turn of the loop
    PART: tl.constexpr,  # keys of a part where parts lie at fixed places, else 0
    SHARED: tl.constexpr,  # whether a tile may have several shares
    WINDOW: tl.constexpr,  # 0: none
    CAPPED: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A tile's keys are cut into parts: one program takes all of them, or each of its shares some, and the last to end
    puts them together.
    """
    portable.wait_for_earlier(EARLY)
    number = tl.program_id(0)
    if number >= tl.load(plan):
        return
    record = plan + HEAD + number * RECORD
    first_row = tl.load(record)
    count = tl.load(record + 1) - first_row
    before = tl.load(record + 2)
    visible = before + count
    share, shares = 0, 1
    if SHARED:
        share, shares = tl.load(record + 5), tl.load(record + 6)
    first_key, length = _cut(shares, before, visible, KEYS, PART, WINDOW)
    parts = tl.cdiv(visible - first_key, length)
    if SHARED:
        shares = tl.maximum(tl.minimum(parts, shares), 1)
        if share >= shares:
            return

    each = tl.arange(0, HEIGHT)
    query = each // HEADS
    within = tl.program_id(1) % tl.cdiv(GROUP, HEADS) * HEADS + each % HEADS
    kv_head = tl.program_id(1) // tl.cdiv(GROUP, HEADS)
    head = kv_head * GROUP + within
    mine = (query < count) & (within < GROUP) & (query < QUERIES)
    at = before + query
    k_place = tl.arange(0, K_ROOM)
    queries = tl.load(
        q + (first_row + query)[:, None].to(tl.int64) * q_row + head[:, None] * q_head + k_place[None, :],
        mask=mine[:, None] & (k_place < K_WIDTH)[None, :],
        other=0.0,
    )
    blocks = plan + HEAD + room * RECORD + tl.load(record + 4)
    keys_at = k_cache + kv_head * K_WIDTH
    values_at = v_cache + kv_head * V_WIDTH
    highest, total, summed = _nothing_seen(sinks, head, mine, shares == 1, HEIGHT, V_ROOM)
    lines = ((tl.load(record + 3) + query) * tl.num_programs(1) + tl.program_id(1)) * HEADS + each % HEADS
    step = count * tl.num_programs(1) * HEADS
    if PART == 0:  # a share is a part
        low, high = first_key, visible
        if SHARED:
            low = first_key + share * length
            high = tl.minimum(low + length, visible)
        highest, total, summed = _attend(
            highest, total, summed, queries, keys_at, values_at, blocks, at, low, high, scale, softcap,
            KV_HEADS, K_WIDTH, V_WIDTH, BLOCK_SIZE, KEYS, WINDOW, CAPPED, STAGES,
        )  # fmt: skip
        if SHARED and shares > 1:
            _store_part(planes, lines + share * step, mine, highest, total, summed, V_WIDTH)
    elif shares == 1:  # a loop of its own: one that also stored parts would move registers to memory
        for part in range(parts):
            low = first_key + part * length
            of_part = _nothing_seen(None, head, mine, False, HEIGHT, V_ROOM)
            of_part = _attend(
                *of_part, queries, keys_at, values_at, blocks, at, low, tl.minimum(low + length, visible),
                scale, softcap, KV_HEADS, K_WIDTH, V_WIDTH, BLOCK_SIZE, KEYS, WINDOW, CAPPED, STAGES,
            )  # fmt: skip
            highest, total, summed = _merge(highest, total, summed, *of_part)
    else:
        for part in range(share, parts, shares):
            low = first_key + part * length
            of_part = _nothing_seen(None, head, mine, False, HEIGHT, V_ROOM)
            of_part = _attend(
                *of_part, queries, keys_at, values_at, blocks, at, low, tl.minimum(low + length, visible),
                scale, softcap, KV_HEADS, K_WIDTH, V_WIDTH, BLOCK_SIZE, KEYS, WINDOW, CAPPED, STAGES,
            )  # fmt: skip
            _store_part(planes, lines + part * step, mine, *of_part, V_WIDTH)
    row = (first_row + query)[:, None].to(tl.int64) * (KV_HEADS * GROUP) + head[:, None]
    there = out + row * V_WIDTH
    if not SHARED or shares == 1:
        _store_result(there, mine, total, summed, V_WIDTH)
    else:
        tl.debug_barrier()  # all threads have stored before one of them counts
        counter = counters + (number - share) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == shares - 1:
            highest, total, summed = _nothing_seen(sinks, head, mine, True, HEIGHT, V_ROOM)
            for part in range(parts):
                of_part = _load_part(planes, lines + part * step, mine, V_WIDTH, V_ROOM)
                highest, total, summed = _merge(highest, total, summed, *of_part)
            tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
            _store_result(there, mine, total, summed, V_WIDTH)


@triton.jit
def _cut(
    shares: tl.tensor,
    before: tl.tensor,
    visible: tl.tensor,
    KEYS: tl.constexpr,
    PART: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tuple:
    """How a tile's keys are cut: the first key, and the length of a part."""
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(before - WINDOW + 1, 0)
    if PART > 0:
        return first_key // PART * PART, PART
    else:
        first_key = first_key // KEYS * KEYS
        return first_key, tl.maximum(tl.cdiv(tl.cdiv(visible - first_key, shares), KEYS) * KEYS, _LEAST_SHARE)


@triton.jit
def _nothing_seen(
    sinks: tl.tensor,  # [query heads] or None
    head: tl.tensor,  # [HEIGHT]
    mine: tl.tensor,  # [HEIGHT]
    first: tl.tensor,  # whether the sinks count here
    HEIGHT: tl.constexpr,
    V_ROOM: tl.constexpr,
) -> tl.tuple:
    """The maximum, total and weighted sum before any key: those of the sinks, which have no value."""
    if sinks is None:
        highest = tl.full((HEIGHT,), _FAR_BELOW, tl.float32)
        total = tl.zeros((HEIGHT,), tl.float32)
    else:
        highest = tl.where(first, tl.load(sinks + head, mask=mine, other=0.0).to(tl.float32), _FAR_BELOW)
        total = tl.where(first, tl.full((HEIGHT,), 1.0, tl.float32), 0.0)
    return highest, total, tl.zeros((HEIGHT, V_ROOM), tl.float32)


@triton.jit
def _attend(
    highest: tl.tensor,  # [HEIGHT]
    total: tl.tensor,  # [HEIGHT]
    summed: tl.tensor,  # [HEIGHT, V_ROOM]
    queries: tl.tensor,  # [HEIGHT, K_ROOM]
    keys_at: tl.tensor,
    values_at: tl.tensor,
    blocks: tl.tensor,
    at: tl.tensor,  # [HEIGHT] the key position of each row
    low: tl.tensor,
    high: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    KV_HEADS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tuple:
    """The running maximum, total and weighted sum of values after keys `low` to `high`; nothing past them is read."""
    k_place = tl.arange(0, queries.shape[1])
    v_place = tl.arange(0, summed.shape[1])
    for start in tl.range(low, high, KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        held = key < high
        block = tl.load(blocks + key // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
        place = (block * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS
        keys = tl.load(
            keys_at + place[:, None] * K_WIDTH + k_place[None, :],
            mask=held[:, None] & (k_place < K_WIDTH)[None, :],
            other=0.0,
        )
        scores = portable.dot(queries, tl.trans(keys), tl.zeros((queries.shape[0], KEYS), tl.float32)) * scale
        if CAPPED:  # softcap * tanh(scores / softcap)
            scores = softcap - 2 * softcap / (tl.exp(2 * scores / softcap) + 1)
        seen = (key[None, :] <= at[:, None]) & held[None, :]
        if WINDOW > 0:
            seen = seen & (key[None, :] > at[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        kept = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest[:, None])
        values = tl.load(
            values_at + place[:, None] * V_WIDTH + v_place[None, :],
            mask=held[:, None] & (v_place < V_WIDTH)[None, :],
            other=0.0,
        )
        total = total * kept + tl.sum(weights, 1)
        summed = portable.dot(portable.narrow(weights, values.dtype), values, summed * kept[:, None])
        highest = new_highest
    return highest, total, summed


@triton.jit
def _merge(
    highest: tl.tensor,
    total: tl.tensor,
    summed: tl.tensor,
    part_highest: tl.tensor,
    part_total: tl.tensor,
    part_summed: tl.tensor,
) -> tl.tuple:
    """The state after one more part."""
    new_highest = tl.maximum(highest, part_highest)
    kept = tl.exp(highest - new_highest)
    taken = tl.exp(part_highest - new_highest)
    total = total * kept + part_total * taken
    return new_highest, total, summed * kept[:, None] + part_summed * taken[:, None]


@triton.jit
def _store_part(
    planes: tl.tensor,
    lines: tl.tensor,  # [HEIGHT]
    mine: tl.tensor,  # [HEIGHT]
    highest: tl.tensor,
    total: tl.tensor,
    summed: tl.tensor,
    V_WIDTH: tl.constexpr,
) -> None:
    """A line has the sum, the maximum and the total of a query's head over a part."""
    line = planes + lines.to(tl.int64) * (V_WIDTH + 4)
    v_place = tl.arange(0, summed.shape[1])
    tl.store(line[:, None] + v_place[None, :], summed, mask=mine[:, None] & (v_place < V_WIDTH)[None, :])
    tl.store(line + V_WIDTH, highest, mask=mine)
    tl.store(line + V_WIDTH + 1, total, mask=mine)


@triton.jit
def _load_part(
    planes: tl.tensor,
    lines: tl.tensor,  # [HEIGHT]
    mine: tl.tensor,  # [HEIGHT]
    V_WIDTH: tl.constexpr,
    V_ROOM: tl.constexpr,
) -> tl.tuple:
    """What `_store_part` stored."""
    line = planes + lines.to(tl.int64) * (V_WIDTH + 4)
    v_place = tl.arange(0, V_ROOM)
    inside = mine[:, None] & (v_place < V_WIDTH)[None, :]
    summed = tl.load(line[:, None] + v_place[None, :], mask=inside, other=0.0)
    highest = tl.load(line + V_WIDTH, mask=mine, other=0.0)
    total = tl.load(line + V_WIDTH + 1, mask=mine, other=0.0)
    return highest, total, summed


@triton.jit
def _store_result(
    there: tl.tensor,  # [HEIGHT, 1] where each row begins
    mine: tl.tensor,  # [HEIGHT]
    total: tl.tensor,
    summed: tl.tensor,
    V_WIDTH: tl.constexpr,
) -> None:
    """The mean of the values; zeros where no key was seen."""
    result = summed / tl.where(total > 0, total, 1.0)[:, None]
    v_place = tl.arange(0, summed.shape[1])[None, :]
    inside = mine[:, None] & (v_place < V_WIDTH)
    tl.store(there + v_place, portable.narrow(result, there.dtype.element_ty), mask=inside)


def attention(
    q: Tensor,  # [rows, query heads, k width], a head's numbers side by side
    k_cache: Tensor,  # [positions, kv heads, k width]
    v_cache: Tensor,  # [positions, kv heads, v width]
    plan: AttentionPlan,
    workspace: Workspace,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,  # [query heads]
    fixed: bool = False,
) -> Tensor:  # [rows, query heads, v width]
    """Causal attention of every tile over its span's blocks; rows of no span come back as zeros.

    Query i sees key k iff k <= i and, with a window w, k > i - w; `softcap * tanh(s / softcap)` bounds the scores
    (Gemma 2); sinks take part in the softmax without a value (gpt-oss). `fixed`, with a plan of `fixed` tiles: a row's
    bits are its own, in a chunk of any length and beside any other span.
    """
    rows, heads, k_width = q.shape
    kv_heads, v_width = v_cache.shape[1:]
    group = heads // kv_heads
    tile_heads = min(group, plans.TILE_HEIGHT)
    assert rows <= plan.rows
    assert plan.queries * tile_heads <= plans.TILE_HEIGHT, "the plan's tiles are too high for such groups"
    assert q.dtype is k_cache.dtype is v_cache.dtype
    assert q.stride(2) == 1
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    out = q.new_empty(rows, heads, v_width)
    programs = kv_heads * -(-group // tile_heads)
    k_room, v_room = (max(16, triton.next_power_of_2(width)) for width in (k_width, v_width))
    height = plans.TILE_HEIGHT if fixed or plan.queries * tile_heads > 16 else 16
    keys, warps, stages = turns(height, k_room, v_room, q.dtype.itemsize)
    _attention_kernel[(plan.records, programs)](
        out,
        q,
        k_cache,
        v_cache,
        sinks,
        plan.buffer,
        workspace.planes(plan.lines * programs * tile_heads * (v_width + 4)),
        workspace.counters(plan.records * programs if plan.shared else 0),
        scale,
        softcap or 0.0,
        *q.stride()[:2],
        room=plan.room,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEADS=tile_heads,
        QUERIES=plan.queries,
        HEIGHT=height,
        K_WIDTH=k_width,
        V_WIDTH=v_width,
        K_ROOM=k_room,
        V_ROOM=v_room,
        BLOCK_SIZE=plan.block_size,
        KEYS=keys,
        PART=plans.PART_KEYS if fixed else 0,
        SHARED=plan.shared,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        STAGES=stages,
        num_warps=warps,
        enable_fp_fusion=not fixed,
        **portable.early(q),
    )
    return out


def turns(height: int, k_room: int, v_room: int, itemsize: int) -> tuple[int, int, int]:
    """Keys of one turn of the loop, warps and turns in flight, for heads of so many numbers of so many bytes."""
    return (_LOW_TURNS if height == 16 else _TURNS)[itemsize][max(64, k_room, v_room)]
