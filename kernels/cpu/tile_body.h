/* The inner product of every float kernel: some rows of x times one block of one strip.
 *
 *     y[r][n] += scale[n] * sum over k of w[k][n] * x[r][k]        r < rows, n < STRIP, k < BLOCK
 *
 * Rows are taken a few at a time, as many as the registers hold; a row's sum runs over k in order whatever its tile is.
 * A kind of weights is a function NAME(kind_weights)(w, g, i, v): vector v of a block's column 8g + i, as floats. `ask` is how
 * many bytes of the weights to ask for every 8 columns, a little at a time as they are used: 0 for what is in the caches. */

#define VECTORS (STRIP / LANES)

/* Tiles by (kind, rows, vectors of the strip at a time). Each load is used more than twice: a core may have one load of
 * AVX-512's width for two products. Weights are decoded as they are read, again for every tile, for up to DECODING_ROWS: for
 * more, decoding them once into memory is no slower. A processor that looks up aside decodes as often as it likes. */
#define TILE_ROWS 6
#if ISA == ISA_AVX512 /* 32 registers: 24 sums, 4 weights; a value is broadcast */
#define TILES(DO, KIND) DO(KIND, 1, 4) DO(KIND, 2, 4) DO(KIND, 3, 4) DO(KIND, 4, 4) DO(KIND, 5, 4) DO(KIND, 6, 4)
#define DECODING_ROWS (LOOKS_UP_ASIDE ? 96 : 12)
#define DECODING_TILE_ROWS (LOOKS_UP_ASIDE ? TILE_ROWS : 12)
#define DECODING_TILES(DO, KIND) \
    TILES(DO, KIND) DO(KIND, 7, 2) DO(KIND, 8, 2) DO(KIND, 9, 2) DO(KIND, 10, 2) DO(KIND, 11, 2) DO(KIND, 12, 2)
#else
#if ISA == ISA_AVX2 /* 16 registers: 12 sums at most */
#define TILES(DO, KIND) DO(KIND, 1, 4) DO(KIND, 2, 4) DO(KIND, 3, 4) DO(KIND, 4, 2) DO(KIND, 5, 2) DO(KIND, 6, 2)
#else /* 16 of half a vector, and a compiler that keeps wider tiles in memory */
#define TILES(DO, KIND) DO(KIND, 1, 1) DO(KIND, 2, 1) DO(KIND, 3, 1) DO(KIND, 4, 1) DO(KIND, 5, 1) DO(KIND, 6, 1)
#endif
#define DECODING_ROWS 1
#define DECODING_TILE_ROWS 1
#define DECODING_TILES(DO, KIND) DO(KIND, 1, 8)
#endif

/* An unrolled loop moves sums between registers; a look-up in one has constants for shifts. */
#define COLUMNS_f32 _Pragma("GCC unroll 1")
#define COLUMNS_bf16 _Pragma("GCC unroll 1")
#define COLUMNS_nf4 _Pragma("GCC unroll 8")

#define DEFINE_TILE(KIND, ROWS, WIDE) \
    static inline TARGET void NAME(KIND##_tile_##ROWS)(const float *x, const void *w, const float *scale, float *y, int64_t ask) { \
        for (int first = 0; first < VECTORS; first += WIDE, scale += WIDE * LANES, y += WIDE * LANES, ask = 0) { \
            VEC sums[ROWS][WIDE]; \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 8") for (int v = 0; v < WIDE; v++) sums[r][v] = vzero(); \
            for (int g = 0; g < BLOCK / 8; g++) { \
                ask_ahead((const uint8_t *)w + g * ask, ask); \
                COLUMNS_##KIND for (int i = 0; i < 8; i++) { \
                    VEC weights[WIDE]; \
                    _Pragma("GCC unroll 8") for (int v = 0; v < WIDE; v++) weights[v] = NAME(KIND##_weights)(w, g, i, first + v); \
                    _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) { \
                        const VEC value = vset1(x[r * BLOCK + 8 * g + i]); \
                        _Pragma("GCC unroll 8") for (int v = 0; v < WIDE; v++) \
                            sums[r][v] = vfma(weights[v], value, sums[r][v]); \
                    } \
                } \
            } \
            VEC scales[WIDE]; /* read once: for all that a compiler knows, y may lie over them */ \
            _Pragma("GCC unroll 8") for (int v = 0; v < WIDE; v++) scales[v] = vload(scale + v * LANES); \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 8") for (int v = 0; v < WIDE; v++) { \
                    float *to = y + r * STRIP + v * LANES; \
                    vstore(to, vfma(sums[r][v], scales[v], vload(to))); \
                } \
        } \
    }

#define RUN_TILE(KIND, ROWS, WIDE) \
    case ROWS: \
        NAME(KIND##_tile_##ROWS)(x + first * per_row, w, scale, y + first * STRIP, first ? 0 : ask); \
        break;

/* NAME(kind_block): every row of x, `per_row` of its elements each, in tiles of nearly equal height, `HIGHEST` rows at most. */
#define DEFINE_ROWS(KIND, TARGETED, X, PER_ROW, TILES, HIGHEST) \
    static TARGETED void NAME(KIND##_block)(int64_t rows, const X *x, const void *w, const float *scale, float *y, int64_t ask) { \
        enum { per_row = PER_ROW }; \
        for (int64_t first = 0, count; first < rows; first += count) { \
            count = tile_height(rows - first, HIGHEST); \
            switch (count) { TILES(RUN_TILE, KIND) } \
        } \
    }
#define DEFINE_BLOCK(KIND, TILES, HIGHEST) \
    TILES(DEFINE_TILE, KIND) \
    DEFINE_ROWS(KIND, TARGET, float, BLOCK, TILES, HIGHEST)

static inline TARGET VEC NAME(f32_weights)(const void *w, int g, int i, int v) {
    return vload((const float *)w + (8 * g + i) * STRIP + v * LANES);
}
DEFINE_BLOCK(f32, TILES, TILE_ROWS)
