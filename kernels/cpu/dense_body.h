/* A strip's product with plain weights: floats, or bfloat16, which are floats without their lower half and so exact here.
 *
 * y[r][n] += sum over blocks of w . x[r]. x: [blocks][all_rows][BLOCK], of which `rows` are taken. */

static TARGET void NAME(f32_strip)(const void *x, int64_t all_rows, int64_t rows, const uint8_t *strip, int64_t blocks,
                                   float *y) {
    for (int64_t b = 0; b < blocks; b++)
        NAME(f32_block)(rows, (const float *)x + b * all_rows * BLOCK, strip + b * F32_BYTES, ONES, y, F32_BYTES / 8);
}

static inline TARGET VEC NAME(bf16_weights)(const void *w, int g, int i, int v) {
    return vload_bf16((const uint16_t *)w + (8 * g + i) * STRIP + v * LANES);
}
DEFINE_BLOCK(bf16, DECODING_TILES, DECODING_TILE_ROWS)

static TARGET void NAME(bf16_strip)(const void *x, int64_t all_rows, int64_t rows, const uint8_t *strip, int64_t blocks,
                                    float *y) {
    _Alignas(64) float w[BLOCK * STRIP];
    for (int64_t b = 0; b < blocks; b++) {
        const uint16_t *halves = (const uint16_t *)(strip + b * BF16_BYTES);
        const float *values = (const float *)x + b * all_rows * BLOCK;
        if (rows <= DECODING_ROWS) {
            NAME(bf16_block)(rows, values, halves, ONES, y, BF16_BYTES / 8);
            continue;
        }
        for (int i = 0; i < BLOCK * STRIP; i += LANES) {
            ask_ahead(halves + i, 1);
            vstore(w + i, vload_bf16(halves + i));
        }
        NAME(f32_block)(rows, values, w, ONES, y, 0);
    }
}
