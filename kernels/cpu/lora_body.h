/* Shrink and expand of one unit of work, for one instruction set. See lora.c for the layout and for what a unit is. */

/* Rows that share what is read of the weights, and vectors of columns that an expand holds for each: as many sums as there are
 * registers for. */
#if ISA == ISA_AVX512
#define SHRINK_ROWS 6
#define SHRINK_TILES(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6)
#define EXPAND_ROWS 6
#define EXPAND_WIDE 4
#define EXPAND_TILES(DO) DO(2) DO(3) DO(4) DO(5) DO(6)
#else
#define SHRINK_ROWS 3
#define SHRINK_TILES(DO) DO(1) DO(2) DO(3)
#define EXPAND_ROWS 4
#define EXPAND_WIDE 2
#define EXPAND_TILES(DO) DO(2) DO(3) DO(4)
#endif

/* A vector of weights, as floats. */
INLINE VEC NAME(weights_at)(const void *from, int64_t at, const int bf16) {
    return bf16 ? vload_bf16((const uint16_t *)from + at) : vload((const float *)from + at);
}

INLINE VEC NAME(weights_part)(const void *from, int64_t at, int64_t count, const int bf16) {
    return bf16 ? NAME(vload_bf16_part)((const uint16_t *)from + at, count)
                : NAME(vload_part)((const float *)from + at, count);
}

/* `to[row * to_stride + k] = factor * (x[row] . a[k])` for RANKS rows of a and up to SHRINK_ROWS rows of x.
 * One running vector per product, whatever the number of rows. */
INLINE void NAME(dot_rows)(
    float *to, int64_t to_stride, const float *x, int64_t width, const void *a, const void *next, float factor,
    const int bf16, const int rows
) {
    const int64_t size = bf16 ? 2 : 4, line = 64 / size, whole = width / LANES * LANES;
    VEC sum[SHRINK_ROWS][RANKS];
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < RANKS; k++) sum[row][k] = vzero();
    for (int64_t i = 0; i < whole; i += LANES) {
        if (i % line == 0)
            for (int k = 0; k < RANKS; k++) PREFETCH(next, (k * width + i) * size);
        VEC part[SHRINK_ROWS];
        for (int row = 0; row < rows; row++) part[row] = vload(x + row * width + i);
        for (int k = 0; k < RANKS; k++) {
            VEC w = NAME(weights_at)(a, k * width + i, bf16);
            KEEP(w);
            for (int row = 0; row < rows; row++) sum[row][k] = vfma(w, part[row], sum[row][k]);
        }
    }
    if (whole < width)
        for (int k = 0; k < RANKS; k++) {
            const VEC w = NAME(weights_part)(a, k * width + whole, width - whole, bf16);
            for (int row = 0; row < rows; row++) {
                const VEC last = NAME(vload_part)(x + row * width + whole, width - whole);
                sum[row][k] = vfma(w, last, sum[row][k]);
            }
        }
    for (int row = 0; row < rows; row++) {
        float sums[RANKS];
        NAME(vsum4)(sums, sum[row][0], sum[row][1], sum[row][2], sum[row][3]);
        for (int k = 0; k < RANKS; k++) to[row * to_stride + k] = sums[k] * factor;
    }
}

INLINE void NAME(shrink_rows)(const Shrink *unit, int64_t row, const void *next, const int bf16, const int rows) {
    NAME(dot_rows)(unit->v + row * unit->v_stride, unit->v_stride, unit->x + row * unit->width, unit->width, unit->a,
                   next, unit->factor, bf16, rows);
}

#define SHRINK_TILE(ROWS) \
    case ROWS: \
        NAME(shrink_rows)(unit, row, next, bf16, ROWS); \
        break;

INLINE void NAME(shrink_unit)(const Shrink *unit, const void *next, const int bf16) {
    for (int64_t row = 0, count; row < unit->rows; row += count) {
        count = tile_height(unit->rows - row, SHRINK_ROWS);
        switch (count) { SHRINK_TILES(SHRINK_TILE) }
    }
}

/* `sum[column] += v[0] * b[0][column] + ...` over RANKS rows of b, in their order. */
INLINE void NAME(add_ranks)(
    float *sum, const float *v, const void *b, int64_t b_stride, int64_t width, const void *next, const int bf16
) {
    const int64_t size = bf16 ? 2 : 4, line = 64 / size, whole = width / LANES * LANES;
    VEC factors[RANKS];
    for (int k = 0; k < RANKS; k++) factors[k] = vset1(v[k]);
    for (int64_t i = 0; i < whole; i += LANES) {
        if (i % line == 0)
            for (int k = 0; k < RANKS; k++) PREFETCH(next, (k * b_stride + i) * size);
        VEC total = vload(sum + i);
        for (int k = 0; k < RANKS; k++) total = vfma(factors[k], NAME(weights_at)(b, k * b_stride + i, bf16), total);
        vstore(sum + i, total);
    }
    if (whole == width) return;
    VEC total = vload(sum + whole);
    for (int k = 0; k < RANKS; k++)
        total = vfma(factors[k], NAME(weights_part)(b, k * b_stride + whole, width - whole, bf16), total);
    vstore(sum + whole, total);
}

INLINE const char *NAME(page_of)(const Expand *unit, int64_t page, const int bf16) {
    return unit->b + unit->page_ids[page] * unit->page_stride * (bf16 ? 2 : 4);
}

INLINE int NAME(is_blank)(const Expand *unit, int64_t page) {
    return unit->scale[unit->page_ids[page] * unit->members] == 0.0f;
}

/* One row of a strip: few ranks at a time over the whole strip, so that memory is read in long runs. */
INLINE void NAME(expand_row)(const Expand *unit, int64_t row, const Expand *next, const int bf16) {
    const int64_t ranks = RANKS * unit->b_stride * (bf16 ? 2 : 4);
    float sum[STRIP] = {0};
    for (int64_t page = 0; page < unit->pages; page++) {
        if (NAME(is_blank)(unit, page)) continue;
        const char *b = NAME(page_of)(unit, page, bf16);
        const float *v = unit->v + row * unit->v_stride + page * unit->v_page_stride;
        for (int64_t k = 0; k < PAGE_RANK; k += RANKS, b += ranks) {
            const char *then = k + RANKS == PAGE_RANK ? NAME(page_of)(next, 0, bf16) : b + ranks;
            NAME(add_ranks)(sum, v + k, b, unit->b_stride, unit->width, then, bf16);
        }
    }
    float *y = unit->y + row * unit->y_stride;
    int64_t i = 0;
    for (; i + LANES <= unit->width; i += LANES) vstore(y + i, vadd(vload(y + i), vload(sum + i)));
    for (; i < unit->width; i++) y[i] += sum[i];
}

/* Some rows and EXPAND_WIDE vectors of columns: the same sums in the same order, held in registers over all ranks. */
INLINE void NAME(expand_tile)(const Expand *unit, int64_t row, int64_t column, const int bf16, const int rows) {
    VEC sum[EXPAND_ROWS][EXPAND_WIDE];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < EXPAND_WIDE; j++) sum[i][j] = vzero();
    for (int64_t page = 0; page < unit->pages; page++) {
        if (NAME(is_blank)(unit, page)) continue;
        const char *b = NAME(page_of)(unit, page, bf16);
        const float *v = unit->v + row * unit->v_stride + page * unit->v_page_stride;
        for (int64_t k = 0; k < PAGE_RANK; k++) {
            VEC weights[EXPAND_WIDE];
            for (int j = 0; j < EXPAND_WIDE; j++) {
                weights[j] = NAME(weights_at)(b, k * unit->b_stride + column + j * LANES, bf16);
                KEEP(weights[j]);
            }
            for (int i = 0; i < rows; i++) {
                const VEC factor = vset1(v[i * unit->v_stride + k]);
                for (int j = 0; j < EXPAND_WIDE; j++) sum[i][j] = vfma(factor, weights[j], sum[i][j]);
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < EXPAND_WIDE; j++) {
            float *y = unit->y + (row + i) * unit->y_stride + column + j * LANES;
            vstore(y, vadd(vload(y), sum[i][j]));
        }
}

#define EXPAND_TILE(ROWS) \
    case ROWS: \
        for (int64_t column = 0; column < columns; column += EXPAND_WIDE * LANES) \
            NAME(expand_tile)(unit, row, column, bf16, ROWS); \
        break;

/* Tiles for FEW rows or more; what is left of a strip's columns, and fewer rows, one by one. */
INLINE void NAME(expand_unit)(const Expand *unit, const Expand *next, const int bf16) {
    const int64_t columns = unit->rows < FEW ? 0 : unit->width / (EXPAND_WIDE * LANES) * (EXPAND_WIDE * LANES);
    for (int64_t row = 0, count; columns && row < unit->rows; row += count) {
        count = tile_height(unit->rows - row, EXPAND_ROWS);
        switch (count) { EXPAND_TILES(EXPAND_TILE) }
    }
    Expand rest = *unit;
    rest.b += columns * (bf16 ? 2 : 4);
    rest.y += columns;
    rest.width -= columns;
    for (int64_t row = 0; rest.width && row < rest.rows; row++) NAME(expand_row)(&rest, row, next, bf16);
}

static TARGET void NAME(shrink)(const Shrink *unit, const void *next, int64_t bf16) {
    if (bf16)
        NAME(shrink_unit)(unit, next, 1);
    else
        NAME(shrink_unit)(unit, next, 0);
}

static TARGET void NAME(expand)(const Expand *unit, const Expand *next, int64_t bf16) {
    if (bf16)
        NAME(expand_unit)(unit, next, 1);
    else
        NAME(expand_unit)(unit, next, 0);
}

#undef SHRINK_ROWS
#undef SHRINK_TILES
#undef SHRINK_TILE
#undef EXPAND_ROWS
#undef EXPAND_WIDE
#undef EXPAND_TILES
#undef EXPAND_TILE
