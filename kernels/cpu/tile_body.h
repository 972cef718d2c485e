/* The inner product of every float kernel: some rows of x times one block of one strip.
 *
 *     y[r][n] += scale[n] * sum over k of w[k][n] * x[r][k]        r < rows, n < STRIP, k < BLOCK
 *
 * Rows are taken a few at a time, as many as the registers hold; a row's sum runs over k in order whatever its tile is.
 * A kind of weights is a function NAME(kind_weights)(w, g, i, v): vector v of a block's column 8g + i, as floats. */

#define VECTORS (STRIP / LANES)

/* Tiles by (kind, rows, vectors of the strip), low ones and, for float kinds, high ones. */
#if ISA == ISA_AVX512 /* 32 registers: 24 sums, 2 weights; a value is broadcast by the product itself */
#define LOW_ROWS 12
#define LOW_TILES(DO, KIND) \
    DO(KIND, 1, 2) DO(KIND, 2, 2) DO(KIND, 3, 2) DO(KIND, 4, 2) DO(KIND, 5, 2) DO(KIND, 6, 2) \
    DO(KIND, 7, 2) DO(KIND, 8, 2) DO(KIND, 9, 2) DO(KIND, 10, 2) DO(KIND, 11, 2) DO(KIND, 12, 2)
/* Half of the strip at a time: looking up a weight costs as much as a product, so that it pays to do it once for more rows. */
#define HIGH_ROWS 24
#define HIGH_TILES(DO, KIND) \
    DO(KIND, 13, 1) DO(KIND, 14, 1) DO(KIND, 15, 1) DO(KIND, 16, 1) DO(KIND, 17, 1) DO(KIND, 18, 1) \
    DO(KIND, 19, 1) DO(KIND, 20, 1) DO(KIND, 21, 1) DO(KIND, 22, 1) DO(KIND, 23, 1) DO(KIND, 24, 1)
#define COLUMNS _Pragma("GCC unroll 8") /* so that a look-up's shift is a constant */
#else /* 16 registers: 12 sums at most; few rows take the whole strip, so that enough sums are under way */
#define LOW_ROWS 6
#define LOW_TILES(DO, KIND) DO(KIND, 1, 4) DO(KIND, 2, 4) DO(KIND, 3, 4) DO(KIND, 4, 2) DO(KIND, 5, 2) DO(KIND, 6, 2)
#define HIGH_ROWS LOW_ROWS
#define HIGH_TILES(DO, KIND)
#define COLUMNS _Pragma("GCC unroll 1")
#endif

#define DEFINE_TILE(KIND, ROWS, WIDE) \
    static inline TARGET void NAME(KIND##_tile_##ROWS)(const float *x, const void *w, const float *scale, float *y) { \
        for (int first = 0; first < VECTORS; first += WIDE, scale += WIDE * LANES, y += WIDE * LANES) { \
            VEC sums[ROWS][WIDE]; \
            _Pragma("GCC unroll 24") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) sums[r][v] = vzero(); \
            for (int g = 0; g < BLOCK / 8; g++) COLUMNS for (int i = 0; i < 8; i++) { \
                VEC weights[WIDE]; \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) weights[v] = NAME(KIND##_weights)(w, g, i, first + v); \
                _Pragma("GCC unroll 24") for (int r = 0; r < ROWS; r++) { \
                    const VEC value = vset1(x[r * BLOCK + 8 * g + i]); \
                    _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) \
                        sums[r][v] = vfma(weights[v], value, sums[r][v]); \
                } \
            } \
            _Pragma("GCC unroll 24") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) { \
                    float *to = y + r * STRIP + v * LANES; \
                    vstore(to, vfma(sums[r][v], vload(scale + v * LANES), vload(to))); \
                } \
        } \
    }

#define RUN_TILE(KIND, ROWS, WIDE) \
    case ROWS: \
        NAME(KIND##_tile_##ROWS)(x + first * BLOCK, w, scale, y + first * STRIP); \
        break;

/* NAME(kind_block): every row of x, in tiles of nearly equal height. */
#define DEFINE_BLOCK(KIND) \
    LOW_TILES(DEFINE_TILE, KIND) HIGH_TILES(DEFINE_TILE, KIND) \
    static TARGET void NAME(KIND##_block)(int64_t rows, const float *x, const void *w, const float *scale, float *y) { \
        int64_t tiles = (rows + HIGH_ROWS - 1) / HIGH_ROWS; \
        for (int64_t first = 0, count; first < rows; first += count, tiles--) { \
            count = (rows - first + tiles - 1) / tiles; \
            switch (count) { LOW_TILES(RUN_TILE, KIND) HIGH_TILES(RUN_TILE, KIND) } \
        } \
    }

static inline TARGET VEC NAME(f32_weights)(const void *w, int g, int i, int v) {
    return vload((const float *)w + (8 * g + i) * STRIP + v * LANES);
}
DEFINE_BLOCK(f32)
