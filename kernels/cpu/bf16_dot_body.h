/* A strip's product with bfloat16 weights and rows rounded to bfloat16, two columns at a time: one instruction of processors
 * with AVX512_BF16. Everywhere else it is two products, for tests.
 *
 * y[r][n] += sum over blocks of w . x[r]. x: [blocks][all_rows][BLOCK / 2] pairs, of which `rows` are taken; a block of weights
 * is [BLOCK / 2][STRIP] pairs. Included after tile_body.h. */

#if ISA == ISA_AVX512 && !defined(LORAPLEX_EMULATE_H)
#define DOT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define add_pair(sum, w, x) _mm512_dpbf16_ps(sum, (__m512bh)(w), (__m512bh)(x))
#else
#define DOT_TARGET TARGET
#define add_pair(sum, w, x) \
    vfma((VEC)((w) & HIGH_HALVES), (VEC)((x) & HIGH_HALVES), vfma((VEC)((w) << 16), (VEC)((x) << 16), sum))
#endif
#define HIGH_HALVES ((BITS){0} + (int32_t)0xffff0000)

#define DEFINE_DOT_TILE(KIND, ROWS, WIDE) \
    static inline DOT_TARGET void NAME(KIND##_tile_##ROWS)(const int32_t *x, const void *w, const float *unused_scale, float *y, int64_t ask) { \
        (void)unused_scale; \
        for (int first = 0; first < VECTORS; first += WIDE, y += WIDE * LANES, ask = 0) { \
            VEC sums[ROWS][WIDE]; \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 8") for (int v = 0; v < WIDE; v++) sums[r][v] = vload(y + r * STRIP + v * LANES); \
            for (int g = 0; g < BLOCK / 8; g++) { \
                ask_ahead((const uint8_t *)w + g * ask, ask); \
                _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) { \
                    const float *here = (const float *)w + (4 * g + i) * STRIP + first * LANES; \
                    BITS weights[WIDE]; \
                    _Pragma("GCC unroll 8") for (int v = 0; v < WIDE; v++) weights[v] = (BITS)vload(here + v * LANES); \
                    _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) { \
                        const BITS values = (BITS){0} + x[r * (BLOCK / 2) + 4 * g + i]; \
                        _Pragma("GCC unroll 8") for (int v = 0; v < WIDE; v++) \
                            sums[r][v] = add_pair(sums[r][v], weights[v], values); \
                    } \
                } \
            } \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 8") for (int v = 0; v < WIDE; v++) vstore(y + r * STRIP + v * LANES, sums[r][v]); \
        } \
    }
TILES(DEFINE_DOT_TILE, bf16_dot)
DEFINE_ROWS(bf16_dot, DOT_TARGET, int32_t, BLOCK / 2, TILES, TILE_ROWS)

static DOT_TARGET void NAME(bf16_dot_strip)(const void *x, int64_t all_rows, int64_t rows, const uint8_t *strip, int64_t blocks,
                                            float *y) {
    for (int64_t b = 0; b < blocks; b++)
        NAME(bf16_dot_block)(rows, (const int32_t *)x + b * all_rows * (BLOCK / 2), strip + b * BF16_BYTES, NULL, y, BF16_BYTES / 8);
}

#undef DOT_TARGET
#undef HIGH_HALVES
#undef add_pair
#undef DEFINE_DOT_TILE
