/* One unit of attention for one instruction set. See attention.c for what a unit is and for the order of its sums. */

/* Copy the rows of some keys (or values) of some heads, each head's side by side, as floats, with zeros up to `padded`
 * numbers each and up to a multiple of KEYS_TOGETHER keys: what lies past the span's end is another's, and may be
 * anything. Heads are the inner loop: a key's lie side by side in memory. */
INLINE void NAME(take_tile)(
    float *to, const void *cache, const Tile *tile, int64_t heads, int64_t width, int64_t padded, const int bf16
) {
    const int64_t whole = width / LANES * LANES;
    for (int64_t key = 0; key < tile->keys; key++)
        for (int64_t head = 0; head < heads; head++) {
            const uint16_t *half = (const uint16_t *)cache + (tile->rows[key] + head) * width;
            const float *full = (const float *)cache + (tile->rows[key] + head) * width;
            float *at = to + (head * TILE + key) * padded;
            for (int64_t i = 0; i < whole; i += LANES) vstore(at + i, bf16 ? vload_bf16(half + i) : vload(full + i));
            if (whole == padded) continue;
            VEC last = vzero();
            if (whole < width)
                last = bf16 ? NAME(vload_bf16_part)(half + whole, width - whole)
                            : NAME(vload_part)(full + whole, width - whole);
            vstore(at + whole, last);
            for (int64_t i = whole + LANES; i < padded; i += LANES) vstore(at + i, vzero());
        }
    for (int64_t head = 0; head < heads; head++)
        for (int64_t key = tile->keys; key % KEYS_TOGETHER; key++)
            for (int64_t i = 0; i < padded; i += LANES) vstore(to + (head * TILE + key) * padded + i, vzero());
}

/* `scores[row][key] = q[row] . keys[key]` for one or two rows and KEYS_TOGETHER keys. */
INLINE void NAME(score)(float *scores, const float *q, const float *keys, int64_t padded, const int rows) {
    VEC sum[2][KEYS_TOGETHER];
    for (int row = 0; row < rows; row++)
        for (int key = 0; key < KEYS_TOGETHER; key++) sum[row][key] = vzero();
    for (int64_t i = 0; i < padded; i += LANES) {
        VEC x[2];
        for (int row = 0; row < rows; row++) x[row] = vload(q + row * padded + i);
        for (int key = 0; key < KEYS_TOGETHER; key++) {
            const VEC k = vload(keys + key * padded + i);
            for (int row = 0; row < rows; row++) sum[row][key] = vfma(x[row], k, sum[row][key]);
        }
    }
    for (int row = 0; row < rows; row++)
        NAME(vsum4)(scores + row * TILE, sum[row][0], sum[row][1], sum[row][2], sum[row][3]);
}

/* Turn a row's scores into weights against its new maximum; `low` to `high` are the keys it sees. */
INLINE void NAME(weigh)(
    float *scores, float *highest, float *total, float *kept, int64_t low, int64_t high, float scale, float softcap
) {
    const float hidden = -__builtin_inff();
    const int64_t until = (high + LANES - 1) / LANES * LANES; /* all later weights are zero */
    VEC largest = vset1(hidden);
    for (int64_t i = 0; i < until; i += LANES) {
        VEC s = vload(scores + i) * vset1(scale);
        if (softcap > 0) s = NAME(vtanh)(s / vset1(softcap)) * vset1(softcap);
        vstore(scores + i, s);
    }
    for (int64_t i = 0; i < low; i++) scores[i] = hidden;
    for (int64_t i = high; i < until; i++) scores[i] = hidden;
    for (int64_t i = 0; i < until; i += LANES) largest = vmax(largest, vload(scores + i));
    const float here = NAME(vhighest)(largest), before = *highest, now = here > before ? here : before;
    VEC sum = vzero();
    for (int64_t i = 0; i < until; i += LANES) {
        const VEC weight = NAME(vexp)(vload(scores + i) - vset1(now));
        vstore(scores + i, weight);
        sum = vadd(sum, weight);
    }
    for (int64_t i = until; i < TILE; i += LANES) vstore(scores + i, vzero());
    float first[LANES];
    vstore(first, NAME(vexp)(vset1(before - now)));
    *kept = first[0];
    *highest = now;
    *total = *total * first[0] + NAME(vsum)(sum);
}

/* `summed[row] = summed[row] * kept[row] + sum of weights[row][key] * values[key]` for `vectors` vectors of each. */
INLINE void NAME(add_values)(
    float *summed, const float *weights, const float *kept, const float *values, int64_t padded, int64_t keys,
    const int rows, const int vectors
) {
    VEC sum[2][4];
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < vectors; i++)
            sum[row][i] = vmul(vload(summed + row * padded + i * LANES), vset1(kept[row]));
    for (int64_t key = 0; key < keys; key++)
        for (int i = 0; i < vectors; i++) {
            const VEC v = vload(values + key * padded + i * LANES);
            for (int row = 0; row < rows; row++) sum[row][i] = vfma(vset1(weights[row * TILE + key]), v, sum[row][i]);
        }
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < vectors; i++) vstore(summed + row * padded + i * LANES, sum[row][i]);
}

/* Ask memory for the rows of KEYS_TOGETHER keys of the tile that comes next, of the head that lies `head` further. */
INLINE void NAME(ask_for)(const Tile *next, int64_t key, int64_t head, const void *cache, int64_t bytes) {
    for (int64_t i = key; i < least(key + KEYS_TOGETHER, next->keys); i++)
        for (int64_t at = 0; at < bytes; at += 64) PREFETCH(cache, (next->rows[i] + head) * bytes + at);
}

/* One or two rows over the tile of their head, which is the unit's `head`th; its first rows ask for the next tile. */
INLINE void NAME(attend_some)(
    const Attention *all, Work *work, int64_t row, int64_t head, const Tile *next, const int first, const int rows
) {
    const int64_t keys = work->tile.keys, size = all->bf16 ? 2 : 4;
    const float *head_keys = work->keys + head * TILE * all->k_padded;
    const float *head_values = work->values + head * TILE * all->v_padded;
    float *scores = work->scores + row * TILE;
    const float *q = work->q + row * all->k_padded;
    for (int64_t key = 0; key < keys; key += KEYS_TOGETHER) {
        NAME(score)(scores + key, q, head_keys + key * all->k_padded, all->k_padded, rows);
        if (!first) continue;
        NAME(ask_for)(next, key, head, all->k_cache, all->k_width * size);
        NAME(ask_for)(next, key, head, all->v_cache, all->v_width * size);
    }
    float kept[2];
    for (int i = 0; i < rows; i++)
        NAME(weigh)(scores + i * TILE, work->highest + row + i, work->total + row + i, kept + i, work->low[row + i],
                    work->high[row + i], all->scale, all->softcap);
    float *summed = work->summed + row * all->v_padded;
    int64_t i = 0;
    for (; i + 4 * LANES <= all->v_padded; i += 4 * LANES)
        NAME(add_values)(summed + i, scores, kept, head_values + i, all->v_padded, keys, rows, 4);
    for (; i < all->v_padded; i += LANES)
        NAME(add_values)(summed + i, scores, kept, head_values + i, all->v_padded, keys, rows, 1);
}

INLINE void NAME(attend_rows)(
    const Attention *all, Work *work, int64_t row, int64_t head, const Tile *next, int first, int64_t rows
) {
    if (rows == 2)
        NAME(attend_some)(all, work, row, head, next, first, 2);
    else
        NAME(attend_some)(all, work, row, head, next, first, 1);
}

/* The queries `first` to `last` of a span, in the heads that read `heads` heads of keys from `head` on. A row is one
 * query in one head; those of one head of keys lie side by side. */
INLINE void NAME(attend_unit)(
    const Attention *all, Work *work, const Span *span, int64_t head, int64_t heads, int64_t first, int64_t last,
    const int bf16
) {
    const int64_t group = all->heads / all->kv_heads, in_head = (last - first) * group, rows = in_head * heads;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row % in_head, query = span->start + first + at / group;
        const int64_t of = (head + row / in_head) * group + at % group;
        const float *from = all->q + query * all->q_row_stride + of * all->q_head_stride;
        float *to = work->q + row * all->k_padded;
        for (int64_t i = 0; i < all->k_width; i++) to[i] = from[i];
        for (int64_t i = all->k_width; i < all->k_padded; i++) to[i] = 0;
        for (int64_t i = 0; i < all->v_padded; i++) work->summed[row * all->v_padded + i] = 0;
        work->highest[row] = all->sinks ? all->sinks[of] : FAR_BELOW;
        work->total[row] = all->sinks ? 1 : 0;
    }
    const int64_t place = span->kv_length - (span->end - span->start); /* of the span's first query among its keys */
    const int64_t oldest = all->window ? most(0, place + first - all->window + 1) : 0;
    Tile next = tile_at(all, span, head, oldest / TILE * TILE);
    for (int64_t at_key = oldest / TILE * TILE; at_key < place + last; at_key += TILE) {
        work->tile = next;
        next = tile_at(all, span, head, at_key + TILE);
        NAME(take_tile)(work->keys, all->k_cache, &work->tile, heads, all->k_width, all->k_padded, bf16);
        NAME(take_tile)(work->values, all->v_cache, &work->tile, heads, all->v_width, all->v_padded, bf16);
        for (int64_t row = 0; row < rows; row++) {
            const int64_t at = place + first + row % in_head / group;
            work->high[row] = most(0, least(TILE, at + 1 - at_key));
            work->low[row] = all->window ? least(TILE, most(0, at - all->window + 1 - at_key)) : 0;
        }
        for (int64_t h = 0; h < heads; h++)
            for (int64_t row = 0; row < in_head; row += 2)
                NAME(attend_rows)(all, work, h * in_head + row, h, &next, row == 0, row + 1 < in_head ? 2 : 1);
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row % in_head, query = span->start + first + at / group;
        const int64_t of = (head + row / in_head) * group + at % group;
        float *to = all->out + (query * all->heads + of) * all->v_width;
        for (int64_t i = 0; i < all->v_width; i++) to[i] = work->summed[row * all->v_padded + i] / work->total[row];
    }
}

static TARGET void NAME(attend)(
    const Attention *all, Work *work, const Span *span, int64_t head, int64_t heads, int64_t first, int64_t last
) {
    if (all->bf16)
        NAME(attend_unit)(all, work, span, head, heads, first, last, 1);
    else
        NAME(attend_unit)(all, work, span, head, heads, first, last, 0);
}
