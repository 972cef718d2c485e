/* The inner product of every matrix kernel: some rows of x times one block of one strip, held as floats.
 *
 *     y[r][n] += scale[n] * sum over k of w[k][n] * x[r][k]        r < rows, n < STRIP, k < BLOCK
 *
 * Rows are taken a few at a time, as many as the registers hold; a row's sum runs over k in order whatever its tile is. */

#define VECTORS (STRIP / LANES)

#define DEFINE_TILE(ROWS, WIDE) \
    static inline TARGET void NAME(tile_##ROWS##x##WIDE)(const float *x, const float *w, const float *scale, float *y) { \
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
    }

#define RUN_TILE(ROWS, WIDE) \
    for (int v = 0; v < VECTORS; v += WIDE) \
        NAME(tile_##ROWS##x##WIDE)(x, w + v * LANES, scale + v * LANES, y + v * LANES); \
    break

#if ISA == ISA_AVX512 /* 32 registers: 24 sums, 2 weights, a value is broadcast by the product itself */
#define TILE_ROWS 12
DEFINE_TILE(1, 2)
DEFINE_TILE(2, 2)
DEFINE_TILE(3, 2)
DEFINE_TILE(4, 2)
DEFINE_TILE(5, 2)
DEFINE_TILE(6, 2)
DEFINE_TILE(7, 2)
DEFINE_TILE(8, 2)
DEFINE_TILE(9, 2)
DEFINE_TILE(10, 2)
DEFINE_TILE(11, 2)
DEFINE_TILE(12, 2)

static TARGET void NAME(tile)(int64_t rows, const float *x, const float *w, const float *scale, float *y) {
    switch (rows) {
    case 1: RUN_TILE(1, 2);
    case 2: RUN_TILE(2, 2);
    case 3: RUN_TILE(3, 2);
    case 4: RUN_TILE(4, 2);
    case 5: RUN_TILE(5, 2);
    case 6: RUN_TILE(6, 2);
    case 7: RUN_TILE(7, 2);
    case 8: RUN_TILE(8, 2);
    case 9: RUN_TILE(9, 2);
    case 10: RUN_TILE(10, 2);
    case 11: RUN_TILE(11, 2);
    case 12: RUN_TILE(12, 2);
    }
}
#else /* 16 registers: 12 sums, and few rows take the whole strip, so that enough sums are under way */
#define TILE_ROWS 6
DEFINE_TILE(1, 4)
DEFINE_TILE(2, 4)
DEFINE_TILE(3, 4)
DEFINE_TILE(4, 2)
DEFINE_TILE(5, 2)
DEFINE_TILE(6, 2)

static TARGET void NAME(tile)(int64_t rows, const float *x, const float *w, const float *scale, float *y) {
    switch (rows) {
    case 1: RUN_TILE(1, 4);
    case 2: RUN_TILE(2, 4);
    case 3: RUN_TILE(3, 4);
    case 4: RUN_TILE(4, 2);
    case 5: RUN_TILE(5, 2);
    case 6: RUN_TILE(6, 2);
    }
}
#endif

/* Every row of x, in tiles of nearly equal height. */
static TARGET void NAME(block)(int64_t rows, const float *x, const float *w, const float *scale, float *y) {
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t first = 0; first < rows; tiles--) {
        const int64_t count = (rows - first + tiles - 1) / tiles;
        NAME(tile)(count, x + first * BLOCK, w, scale, y + first * STRIP);
        first += count;
    }
}

#undef DEFINE_TILE
#undef RUN_TILE
#undef TILE_ROWS
