/* Shrink and expand of one unit of work, for one instruction set. See lora.c for the layout and for what a unit is. */

/* A vector of weights, as floats. */
INLINE VEC NAME(weights_at)(const void *from, int64_t at, const int bf16) {
    return bf16 ? vload_bf16((const uint16_t *)from + at) : vload((const float *)from + at);
}

INLINE VEC NAME(weights_part)(const void *from, int64_t at, int64_t count, const int bf16) {
    return bf16 ? NAME(vload_bf16_part)((const uint16_t *)from + at, count)
                : NAME(vload_part)((const float *)from + at, count);
}

/* `to[row * to_stride + k] = factor * (x[row] . a[k])` for RANKS rows of a and up to ROWS_TOGETHER rows of x.
 * One running vector per product, whatever the number of rows. */
INLINE void NAME(dot_rows)(
    float *to, int64_t to_stride, const float *x, int64_t width, const void *a, const void *next, float factor,
    const int bf16, const int rows
) {
    const int64_t size = bf16 ? 2 : 4, line = 64 / size, whole = width / LANES * LANES;
    VEC sum[ROWS_TOGETHER][RANKS];
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < RANKS; k++) sum[row][k] = vzero();
    for (int64_t i = 0; i < whole; i += LANES) {
        if (i % line == 0)
            for (int k = 0; k < RANKS; k++) PREFETCH(next, (k * width + i) * size);
        VEC part[ROWS_TOGETHER];
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

INLINE void NAME(shrink_unit)(const Shrink *unit, const void *next, const int bf16) {
    int64_t row = 0;
    for (; row + 3 <= unit->rows; row += 3) NAME(shrink_rows)(unit, row, next, bf16, 3);
    if (row + 2 == unit->rows) NAME(shrink_rows)(unit, row, next, bf16, 2);
    if (row + 1 == unit->rows) NAME(shrink_rows)(unit, row, next, bf16, 1);
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

/* FOUR rows and two vectors of columns: the same sums in the same order, held in registers over all ranks. */
INLINE void NAME(expand_four)(const Expand *unit, int64_t row, int64_t column, const int bf16) {
    VEC sum[FOUR][2];
    for (int i = 0; i < FOUR; i++) sum[i][0] = sum[i][1] = vzero();
    for (int64_t page = 0; page < unit->pages; page++) {
        if (NAME(is_blank)(unit, page)) continue;
        const char *b = NAME(page_of)(unit, page, bf16);
        const float *v = unit->v + row * unit->v_stride + page * unit->v_page_stride;
        for (int64_t k = 0; k < PAGE_RANK; k++) {
            VEC one = NAME(weights_at)(b, k * unit->b_stride + column, bf16);
            VEC two = NAME(weights_at)(b, k * unit->b_stride + column + LANES, bf16);
            KEEP(one);
            KEEP(two);
            for (int i = 0; i < FOUR; i++) {
                const VEC factor = vset1(v[i * unit->v_stride + k]);
                sum[i][0] = vfma(factor, one, sum[i][0]);
                sum[i][1] = vfma(factor, two, sum[i][1]);
            }
        }
    }
    for (int i = 0; i < FOUR; i++) {
        float *y = unit->y + (row + i) * unit->y_stride + column;
        vstore(y, vadd(vload(y), sum[i][0]));
        vstore(y + LANES, vadd(vload(y + LANES), sum[i][1]));
    }
}

INLINE void NAME(expand_unit)(const Expand *unit, const Expand *next, const int bf16) {
    const int64_t fours = unit->rows / FOUR * FOUR, columns = unit->width / (2 * LANES) * 2 * LANES;
    for (int64_t row = 0; row < fours; row += FOUR)
        for (int64_t column = 0; column < columns; column += 2 * LANES) NAME(expand_four)(unit, row, column, bf16);
    Expand rest = *unit;
    rest.b += columns * (bf16 ? 2 : 4);
    rest.y += columns;
    rest.width -= columns;
    for (int64_t row = 0; rest.width && row < fours; row++) NAME(expand_row)(&rest, row, next, bf16);
    for (int64_t row = fours; row < unit->rows; row++) NAME(expand_row)(unit, row, next, bf16);
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
