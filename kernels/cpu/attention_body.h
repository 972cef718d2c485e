/* One unit of attention for one instruction set. See attention.c for what a unit is and for the order of its sums. */

/* How many vectors some rows are taken with at a time, so that their sums and those vectors fill the registers, and one row
 * has sums enough to wait for none. Of the compiler's own vectors, one: with two, GCC 12 keeps the sums in memory. */
#if ISA == ISA_AVX512
#define WIDE(rows) 4
#define LOW FOUR
#define TALL FOUR
#elif ISA == ISA_AVX2
#define WIDE(rows) ((rows) <= 3 ? 4 : 2)
#define LOW FOUR
#define TALL TWO
#else
#define WIDE(rows) 1
#define LOW ONE
#define TALL ONE
#endif

/* Up to LANES of the cache's numbers from `at` on, as floats, and zeros. */
INLINE VEC NAME(cached)(const void *cache, int64_t at, int64_t count, const int bf16) {
    const uint16_t *half = (const uint16_t *)cache + at;
    const float *full = (const float *)cache + at;
    if (count >= LANES) return bf16 ? vload_bf16(half) : vload(full);
    return bf16 ? NAME(vload_bf16_part)(half, most(0, count)) : NAME(vload_part)(full, most(0, count));
}

/* Lay the tile's keys of some heads as [heads, k_padded, TILE], and ask memory for those of the next tile on the way. */
INLINE void NAME(take_keys)(const Attention *all, Work *work, int64_t heads, const Tile *next, const int bf16) {
    const void *cache = all->k_cache;
    const int64_t width = all->k_width, size = bf16 ? 2 : 4;
    for (int64_t first = 0; first < work->tile.keys; first += LANES)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t at = 0; at < width; at += LANES) {
                const int64_t *rows = work->tile.rows + first, *later = next->rows + first, in_row = head * width + at;
                VEC block[LANES];
                for (int i = 0; i < LANES; i++) block[i] = NAME(cached)(cache, rows[i] * width + in_row, width - at, bf16);
                if (first < next->keys && at * size % LINE == 0)
                    for (int i = 0; i < LANES; i++) PREFETCH(cache, (later[i] * width + in_row) * size);
                NAME(vtranspose)(block);
                float *to = work->keys + (head * all->k_padded + at) * TILE + first;
                for (int i = 0; i < LANES; i++) vstore(to + i * TILE, block[i]);
            }
}

/* Copy the tile's values of some heads, as [heads, TILE, v_padded]. Heads are the inner loop: a key's lie side by side in
 * memory. */
INLINE void NAME(take_values)(const Attention *all, Work *work, int64_t heads, const Tile *next, const int bf16) {
    const int64_t width = all->v_width, size = bf16 ? 2 : 4;
    for (int64_t key = 0; key < work->tile.keys; key++) {
        const int64_t row = work->tile.rows[key] * width, later = next->rows[key] * width;
        for (int64_t head = 0; head < heads; head++) {
            float *to = work->values + (head * TILE + key) * all->v_padded;
            for (int64_t at = 0; at < all->v_padded; at += LANES)
                vstore(to + at, NAME(cached)(all->v_cache, row + head * width + at, width - at, bf16));
        }
        for (int64_t at = 0; key < next->keys && at < heads * width * size; at += LINE)
            PREFETCH(all->v_cache, later * size + at);
    }
}

/* `to[row] = to[row] * kept[row] + sum over i of factors[row][i] * from[i]`, or from zero where `kept` is NULL, for some
 * vectors of each. A sum runs over i in order whatever rows it is made with. */
#define DEFINE_ADD(ROWS, COUNT) \
    static TARGET void NAME(add_##ROWS##_by_##COUNT)( \
        float *to, int64_t to_stride, const float *kept, const float *factors, int64_t factors_stride, const float *from, \
        int64_t from_stride, int64_t count \
    ) { \
        VEC sums[ROWS][COUNT]; \
        _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) \
            _Pragma("GCC unroll 4") for (int v = 0; v < COUNT; v++) { \
                sums[r][v] = vzero(); \
                if (kept) sums[r][v] = vmul(vload(to + r * to_stride + v * LANES), vset1(kept[r])); \
            } \
        _Pragma("GCC unroll 1") for (int64_t i = 0; i < count; i++, from += from_stride, factors++) { \
            VEC each[COUNT]; \
            _Pragma("GCC unroll 4") for (int v = 0; v < COUNT; v++) each[v] = vload(from + v * LANES); \
            _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) { \
                const VEC factor = vset1(factors[r * factors_stride]); \
                _Pragma("GCC unroll 4") for (int v = 0; v < COUNT; v++) sums[r][v] = vfma(each[v], factor, sums[r][v]); \
            } \
        } \
        _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) \
            _Pragma("GCC unroll 4") for (int v = 0; v < COUNT; v++) vstore(to + r * to_stride + v * LANES, sums[r][v]); \
    }
#define DEFINE_ADDS(WIDTHS, ROWS) WIDTHS(DEFINE_ADD, ROWS)
HEIGHTS(DEFINE_ADDS)

#define POINT_AT_ADD(ROWS, COUNT) NAME(add_##ROWS##_by_##COUNT),
#define POINT_AT_ADDS(WIDTHS, ROWS) {WIDTHS(POINT_AT_ADD, ROWS)},
/* Called by pointer: in line, with what else is held in registers there, sums would go to memory and back. */
static const add_fn NAME(adds)[TOGETHER][4] = {HEIGHTS(POINT_AT_ADDS)};

/* The same for up to TOGETHER rows and any number of vectors. */
INLINE void NAME(add)(
    float *to, int64_t to_stride, const float *kept, const float *factors, int64_t factors_stride, const float *from,
    int64_t from_stride, int64_t count, int64_t rows, int64_t vectors
) {
    for (int64_t at = 0, some; at < vectors; at += some) {
        some = least(WIDE(rows), vectors - at);
        NAME(adds)[rows - 1][some - 1](
            to + at * LANES, to_stride, kept, factors, factors_stride, from + at * LANES, from_stride, count
        );
    }
}

/* Hide from a row what it does not see of some keys, all but `low` to `high`, and return its highest score. */
INLINE float NAME(show)(float *scores, int64_t vectors, int64_t low, int64_t high, float softcap) {
    const VEC hidden = vset1(-__builtin_inff());
    VEC largest = hidden;
    for (int64_t i = 0; softcap > 0 && i < vectors * LANES; i += LANES)
        vstore(scores + i, NAME(vtanh)(vload(scores + i) / vset1(softcap)) * vset1(softcap));
    for (int64_t i = 0; (low > 0 || high < vectors * LANES) && i < vectors * LANES; i += LANES) {
        const VEC key = vload(COUNTED) + vset1((float)i);
        const BITS seen = (BITS)(key >= vset1((float)low)) & (BITS)(key < vset1((float)high));
        vstore(scores + i, NAME(vselect)(seen, vload(scores + i), hidden));
    }
    for (int64_t i = 0; i < vectors * LANES; i += LANES) largest = vmax(largest, vload(scores + i));
    return NAME(vhighest)(largest);
}

/* Turn a row's scores into weights against its maximum, and add them to its total, lane by lane. */
INLINE void NAME(weigh)(float *scores, int64_t vectors, float highest, float kept, float *total) {
    VEC sum = vmul(vload(total), vset1(kept));
    for (int64_t i = 0; i < vectors * LANES; i += LANES) {
        const VEC weight = NAME(vexp_down)(vload(scores + i) - vset1(highest));
        vstore(scores + i, weight);
        sum = vadd(sum, weight);
    }
    vstore(total, sum);
}

/* Up to TOGETHER rows over the tile of their head, which is the unit's `head`th and begins at key `first`. */
INLINE void NAME(attend_some)(const Attention *all, Work *work, int64_t row, int64_t rows, int64_t head, int64_t first) {
    const int64_t seen = least(TILE, work->rows[row + rows - 1].place + 1 - first); /* by the last, which sees most */
    if (seen <= 0) return;
    const int64_t vectors = (seen + LANES - 1) / LANES;
    float *scores = work->scores;
    NAME(add)(scores, TILE, NULL, work->q + row * all->k_width, all->k_width, work->keys + head * all->k_padded * TILE, TILE,
              all->k_width, rows, vectors);
    float kept[LANES] = {0};
    for (int64_t i = 0; i < rows; i++) {
        Row *it = work->rows + row + i;
        const int64_t until = it->place + 1 - first;
        const int64_t from = all->window ? until - all->window : 0;
        const float here = NAME(show)(scores + i * TILE, vectors, from, until, all->softcap), before = it->highest;
        it->highest = here > before ? here : before;
        kept[i] = before - it->highest;
    }
    vstore(kept, NAME(vexp_down)(vload(kept)));
    for (int64_t i = 0; i < rows; i++)
        NAME(weigh)(scores + i * TILE, vectors, work->rows[row + i].highest, kept[i], work->total + (row + i) * LANES);
    NAME(add)(work->summed + row * all->v_padded, all->v_padded, kept, scores, TILE,
              work->values + head * TILE * all->v_padded, all->v_padded, seen, rows, all->v_padded / LANES);
}

/* The rows of a unit: the queries `first` to `last` of a span, in the heads that read `heads` heads of keys from `head` on.
 * Those of one head of keys lie side by side, a query's after one another. */
INLINE void NAME(begin)(
    const Attention *all, Work *work, const Span *span, int64_t head, int64_t heads, int64_t first, int64_t last
) {
    const int64_t group = all->heads / all->kv_heads, start = span->kv_length - (span->end - span->start);
    int64_t row = 0;
    for (int64_t h = head; h < head + heads; h++)
        for (int64_t query = first; query < last; query++)
            for (int64_t of = h * group; of < (h + 1) * group; of++, row++) {
                const float *from = all->q + (span->start + query) * all->q_row_stride + of * all->q_head_stride;
                float *out = all->out + ((span->start + query) * all->heads + of) * all->v_width;
                for (int64_t i = 0; i < all->k_width; i++) work->q[row * all->k_width + i] = from[i] * all->scale;
                for (int64_t i = 0; i < all->v_padded; i += LANES) vstore(work->summed + row * all->v_padded + i, vzero());
                vstore(work->total + row * LANES, vzero());
                if (all->sinks) work->total[row * LANES] = 1;
                work->rows[row] = (Row){start + query, all->sinks ? all->sinks[of] : FAR_BELOW, out};
            }
}

INLINE void NAME(attend_unit)(
    const Attention *all, Work *work, const Span *span, int64_t head, int64_t heads, int64_t first, int64_t last,
    const int bf16
) {
    const int64_t in_head = (last - first) * (all->heads / all->kv_heads), rows = in_head * heads;
    NAME(begin)(all, work, span, head, heads, first, last);
    const int64_t until = work->rows[rows - 1].place + 1;
    const int64_t oldest = all->window ? most(0, work->rows[0].place + 1 - all->window) : 0;
    Tile next = tile_at(all, span, head, oldest / TILE * TILE);
    for (int64_t key = oldest / TILE * TILE; key < until; key += TILE) {
        work->tile = next;
        next = tile_at(all, span, head, key + TILE);
        NAME(take_keys)(all, work, heads, &next, bf16);
        NAME(take_values)(all, work, heads, &next, bf16);
        for (int64_t h = 0; h < heads; h++)
            for (int64_t row = 0; row < in_head; row += TOGETHER)
                NAME(attend_some)(all, work, h * in_head + row, least(TOGETHER, in_head - row), h, key);
    }
    for (int64_t row = 0; row < rows; row++) {
        const float share = 1 / NAME(vsum)(vload(work->total + row * LANES)), *summed = work->summed + row * all->v_padded;
        float *out = work->rows[row].out;
        for (int64_t i = 0; i < all->v_width; i++) out[i] = summed[i] * share;
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

#undef WIDE
#undef LOW
#undef TALL
#undef DEFINE_ADD
#undef DEFINE_ADDS
#undef POINT_AT_ADD
#undef POINT_AT_ADDS
