/* A strip's product in 8-bit integers: x rounded to int8 by its largest magnitude in each block of 64, the 16 NF4 values
 * rounded to int8 once (127 times themselves). Sums of a block are exact integers, so every path has the same ones.
 *
 *     y[r][n] += scale[n] * (x.scale / 127) * sum over k of value[code[k][n]] * x.values[k]
 *
 * The dot product's instruction takes unsigned weights, so they are kept with 128 added, and 128 times the sum of x is taken off
 * again beforehand. Included after tile_body.h. */

#if ISA == ISA_AVX512
#define INT8_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define IVEC __v16si
#define iload(from) (__v16si)_mm512_loadu_si512(from)
#define iset1(value) (__v16si)_mm512_set1_epi32(value)
#define idot(sum, w, x) (__v16si)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(x))
#define ifloat(v) _mm512_cvtepi32_ps((__m512i)(v))
#elif ISA == ISA_AVX2
#define INT8_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define IVEC __m256i
#define iload(from) _mm256_loadu_si256((const void *)(from))
#define iset1(value) _mm256_set1_epi32(value)
#define idot(sum, w, x) _mm256_dpbusd_avx_epi32(sum, w, x)
#define ifloat(v) _mm256_cvtepi32_ps(v)
#else
#ifndef LORAPLEX_PORTABLE_INT8
#define LORAPLEX_PORTABLE_INT8
typedef int32_t portable_ints __attribute__((vector_size(32), aligned(4), may_alias));
static inline portable_ints portable_dot(portable_ints sum, portable_ints w, portable_ints x) {
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 4; j++) sum[i] += (int32_t)((uint32_t)w[i] >> 8 * j & 255) * (int8_t)((uint32_t)x[i] >> 8 * j);
    return sum;
}
#endif
#define INT8_TARGET
#define IVEC portable_ints
#define iload(from) (*(const portable_ints *)(from))
#define iset1(value) ((portable_ints){0} + (value))
#define idot(sum, w, x) portable_dot(sum, w, x)
#define ifloat(v) __builtin_convertvector(v, portable_vec)
#endif

#define BYTES VECTOR_JOIN(bytes, ISA_NAME)
typedef int8_t BYTES __attribute__((vector_size(LANES)));

/* One row of x [rows, k], k a multiple of BLOCK, to its places in [blocks, rows]. Adding 1.5 * 2^23 rounds a float: its lowest
 * byte is then the integer. What is not finite makes the scale NaN, and so the row's results. */
static INT8_TARGET void NAME(round_row)(const float *x, int64_t row, int64_t rows, int64_t k, void *out) {
    const VEC shift = vset1(12582912.0f);
    const BITS magnitude = (BITS){0} | INT32_MAX;
    for (int64_t b = 0; b < k / BLOCK; b++, x += BLOCK) {
        int8_row *to = (int8_row *)out + b * rows + row;
        VEC high = vzero(), poison = vzero();
        for (int i = 0; i < BLOCK; i += LANES) {
            const VEC v = vload(x + row * k + i);
            high = vmax(high, (VEC)((BITS)v & magnitude));
            poison = vfma(v, vzero(), poison);
        }
        const float largest = NAME(vhighest)(high), unknown = NAME(vsum)(poison);
        if (unknown != 0) {
            *to = (int8_row){.scale = unknown};
            continue;
        }
        const VEC factor = vset1(largest < LEAST_SCALE ? 0 : 127 / largest);
        BITS sums = {0};
        for (int i = 0; i < BLOCK; i += LANES) {
            const VEC v = vadd(vmul(vload(x + row * k + i), factor), shift);
            const BYTES bytes = __builtin_convertvector((BITS)v, BYTES);
            memcpy(to->values + i, &bytes, sizeof bytes);
            sums += (BITS)v - (BITS)shift;
        }
        int32_t sum = 0;
        for (int i = 0; i < LANES; i++) sum += sums[i];
        to->scale = largest / (127 * 127);
        to->start = -128 * sum;
    }
}

/* Vector v of the weights of columns 4g .. 4g + 3, plus 128. Where the look-up has ports of its own beside the dot product's,
 * codes are looked up as they are read, for every tile again; else once for all tiles, into [BLOCK / 4][STRIP] dwords. */
#if ISA == ISA_AVX512
static inline INT8_TARGET IVEC NAME(int8_weights)(const uint8_t *codes, int64_t g, int64_t v) {
    const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)INT8_VALUES));
    const __m512i pairs = _mm512_loadu_si512(codes + (g / 2 * STRIP + v * LANES) * 4);
    const __m512i low = _mm512_and_si512(g % 2 ? _mm512_srli_epi16(pairs, 4) : pairs, _mm512_set1_epi8(15));
    return (IVEC)_mm512_shuffle_epi8(values, low);
}
#define WEIGHTS(codes, w) ((void)(w), (codes))
#else
static inline INT8_TARGET IVEC NAME(int8_weights)(const uint8_t *w, int64_t g, int64_t v) {
    return iload(w + (g * STRIP + v * LANES) * 4);
}

static INT8_TARGET const uint8_t *NAME(int8_unpack)(const uint8_t *codes, uint8_t *w) {
#if ISA == ISA_AVX2
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)INT8_VALUES)), low = _mm256_set1_epi8(15);
    for (int at = 0; at < NF4_CODES; at += 32) {
        uint8_t *to = w + at / (STRIP * 4) * (STRIP * 8) + at % (STRIP * 4);
        const __m256i both = _mm256_loadu_si256((const void *)(codes + at));
        _mm256_storeu_si256((void *)to, _mm256_shuffle_epi8(values, _mm256_and_si256(both, low)));
        _mm256_storeu_si256((void *)(to + STRIP * 4),
                            _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi16(both, 4), low)));
    }
#else
    for (int at = 0; at < NF4_CODES; at++) {
        uint8_t *to = w + at / (STRIP * 4) * (STRIP * 8) + at % (STRIP * 4);
        to[0] = INT8_VALUES[codes[at] & 15];
        to[STRIP * 4] = INT8_VALUES[codes[at] >> 4];
    }
#endif
    return w;
}
#define WEIGHTS(codes, w) NAME(int8_unpack)(codes, w)
#endif

#define DEFINE_INT8_TILE(KIND, ROWS, WIDE) \
    static inline INT8_TARGET void NAME(KIND##_tile_##ROWS)(const int8_row *x, const uint8_t *w, const float *scale, float *y) { \
        for (int first = 0; first < VECTORS; first += WIDE, w += WIDE * LANES * 4, scale += WIDE * LANES, y += WIDE * LANES) { \
            IVEC sums[ROWS][WIDE]; \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) sums[r][v] = iset1(x[r].start); \
            _Pragma("GCC unroll 2") for (int g = 0; g < BLOCK / 4; g++) { \
                IVEC weights[WIDE]; \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) weights[v] = NAME(int8_weights)(w, g, v); \
                _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) { \
                    const IVEC values = iset1(x[r].dwords[g]); \
                    _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) \
                        sums[r][v] = idot(sums[r][v], weights[v], values); \
                } \
            } \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) { \
                    float *to = y + r * STRIP + v * LANES; \
                    const VEC sum = vmul(ifloat(sums[r][v]), vset1(x[r].scale)); \
                    vstore(to, vfma(sum, vload(scale + v * LANES), vload(to))); \
                } \
        } \
    }
LOW_TILES(DEFINE_INT8_TILE, int8)

static INT8_TARGET void NAME(int8_tile)(int64_t rows, const int8_row *x, const uint8_t *w, const float *scale, float *y) {
#define RUN_INT8_TILE(KIND, ROWS, WIDE) \
    case ROWS: \
        NAME(int8_tile_##ROWS)(x, w, scale, y); \
        break;
    switch (rows) { LOW_TILES(RUN_INT8_TILE, int8) }
#undef RUN_INT8_TILE
}

static INT8_TARGET void NAME(int8_strip)(const void *x, int64_t all_rows, int64_t rows, const uint8_t *strip, int64_t blocks,
                                         float *y) {
    _Alignas(64) uint8_t unpacked[BLOCK * STRIP];
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *codes = strip + b * NF4_BYTES;
        const int8_row *values = (const int8_row *)x + b * all_rows;
        ask_ahead(codes, NF4_BYTES);
        const uint8_t *w = WEIGHTS(codes, unpacked);
        int64_t tiles = (rows + LOW_ROWS - 1) / LOW_ROWS;
        for (int64_t first = 0, count; first < rows; first += count, tiles--) {
            count = (rows - first + tiles - 1) / tiles;
            NAME(int8_tile)(count, values + first, w, (const float *)(codes + NF4_CODES), y + first * STRIP);
        }
    }
}

#undef INT8_TARGET
#undef WEIGHTS
#undef BYTES
#undef IVEC
#undef iload
#undef iset1
#undef idot
#undef ifloat
#undef DEFINE_INT8_TILE
#undef DEFINE_TILE
#undef DEFINE_BLOCK
#undef RUN_TILE
#undef COLUMNS
#undef LOW_TILES
#undef LOW_ROWS
#undef HIGH_TILES
#undef HIGH_ROWS
#undef VECTORS
