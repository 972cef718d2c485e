/* A strip's product with plain weights: floats, or bfloat16, which are floats without their lower half and so exact here.
 *
 * y[r][n] += sum over blocks of w . x[r]. x: [blocks][all_rows][BLOCK], of which `rows` are taken. */

static TARGET void NAME(f32_strip)(const void *x, int64_t all_rows, int64_t rows, const uint8_t *strip, int64_t blocks,
                                   float *y) {
    for (int64_t b = 0; b < blocks; b++) {
        ask_ahead(strip + b * F32_BYTES, F32_BYTES);
        NAME(f32_block)(rows, (const float *)x + b * all_rows * BLOCK, strip + b * F32_BYTES, ONES, y);
    }
}

#if ISA == ISA_AVX512
static inline TARGET VEC NAME(bf16_weights)(const void *w, int g, int i, int v) {
    return vload_bf16((const uint16_t *)w + (8 * g + i) * STRIP + v * LANES);
}
DEFINE_BLOCK(bf16)
#else
static TARGET void NAME(bf16_block)(int64_t rows, const float *x, const uint16_t *halves, const float *scale, float *y) {
    _Alignas(64) float w[BLOCK * STRIP];
    for (int i = 0; i < BLOCK * STRIP; i += LANES) vstore(w + i, vload_bf16(halves + i));
    NAME(f32_block)(rows, x, w, scale, y);
}
#endif

static TARGET void NAME(bf16_strip)(const void *x, int64_t all_rows, int64_t rows, const uint8_t *strip, int64_t blocks,
                                    float *y) {
    for (int64_t b = 0; b < blocks; b++) {
        const uint16_t *halves = (const uint16_t *)(strip + b * BF16_BYTES);
        const float *values = (const float *)x + b * all_rows * BLOCK;
        if (all_rows > 1) {
            ask_ahead(strip + b * BF16_BYTES, BF16_BYTES);
            NAME(bf16_block)(rows, values, halves, ONES, y);
            continue;
        }
        VEC sums[VECTORS]; /* a row alone is multiplied as the weights are read, in the same order */
        for (int v = 0; v < VECTORS; v++) sums[v] = vzero();
        for (int k = 0; k < BLOCK; k++) {
            PREFETCH(halves + k * STRIP, AHEAD);
            for (int v = 0; v < VECTORS; v++)
                sums[v] = vfma(vload_bf16(halves + k * STRIP + v * LANES), vset1(values[k]), sums[v]);
        }
        for (int v = 0; v < VECTORS; v++) vstore(y + v * LANES, vadd(sums[v], vload(y + v * LANES)));
    }
}
