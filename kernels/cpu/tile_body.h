/* The inner product of every float kernel: some rows of x times one block of one strip, held as floats.
 *
 *     y[r][n] += scale[n] * sum over k of w[k][n] * x[r][k]        r < rows, n < STRIP, k < BLOCK
 *
 * Rows are taken a few at a time, as many as the registers hold; a row's sum runs over k in order whatever its tile is. */

#define VECTORS (STRIP / LANES)

/* TILES(rows, vectors of the strip): */
#if ISA == ISA_AVX512 /* 32 registers: 24 sums, 2 weights; a value is broadcast by the product itself */
#define TILE_ROWS 12
#define TILES(DO) \
    DO(1, 2) DO(2, 2) DO(3, 2) DO(4, 2) DO(5, 2) DO(6, 2) DO(7, 2) DO(8, 2) DO(9, 2) DO(10, 2) DO(11, 2) DO(12, 2)
#else /* 16 registers: 12 sums at most; few rows take the whole strip, so that enough sums are under way */
#define TILE_ROWS 6
#define TILES(DO) DO(1, 4) DO(2, 4) DO(3, 4) DO(4, 2) DO(5, 2) DO(6, 2)
#endif

#define DEFINE_TILE(ROWS, WIDE) \
    static inline TARGET void NAME(tile_##ROWS)(const float *x, const float *w, const float *scale, float *y) { \
        for (int first = 0; first < VECTORS; first += WIDE, w += WIDE * LANES, scale += WIDE * LANES, y += WIDE * LANES) { \
            VEC sums[ROWS][WIDE]; \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) sums[r][v] = vzero(); \
            for (int k = 0; k < BLOCK; k++) { \
                VEC weights[WIDE]; \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) weights[v] = vload(w + k * STRIP + v * LANES); \
                _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) { \
                    const VEC value = vset1(x[r * BLOCK + k]); \
                    _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) \
                        sums[r][v] = vfma(weights[v], value, sums[r][v]); \
                } \
            } \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) { \
                    float *to = y + r * STRIP + v * LANES; \
                    vstore(to, vfma(sums[r][v], vload(scale + v * LANES), vload(to))); \
                } \
        } \
    }
TILES(DEFINE_TILE)

static TARGET void NAME(tile)(int64_t rows, const float *x, const float *w, const float *scale, float *y) {
#define RUN_TILE(ROWS, WIDE) \
    case ROWS: \
        NAME(tile_##ROWS)(x, w, scale, y); \
        break;
    switch (rows) { TILES(RUN_TILE) }
#undef RUN_TILE
}

/* Every row of x, in tiles of nearly equal height. */
static TARGET void NAME(block)(int64_t rows, const float *x, const float *w, const float *scale, float *y) {
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t first = 0, count; first < rows; first += count, tiles--) {
        count = (rows - first + tiles - 1) / tiles;
        NAME(tile)(count, x + first * BLOCK, w, scale, y + first * STRIP);
    }
}

#undef DEFINE_TILE
