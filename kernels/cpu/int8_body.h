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

/* Vector v of the weights of the four columns from 8g + 4i on, plus 128: decoded before, into [BLOCK / 4][STRIP] dwords, or now. */
static inline INT8_TARGET IVEC NAME(int8_weights)(const uint8_t *w, int g, int i, int v) {
    return iload(w + ((2 * g + i) * STRIP + v * LANES) * 4);
}

#if ISA == ISA_AVX512
static inline INT8_TARGET IVEC NAME(code_weights)(const uint8_t *codes, int g, int i, int v) {
    const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)INT8_VALUES));
    const __m512i pairs = _mm512_loadu_si512(codes + (g * STRIP + v * LANES) * 4);
    const __m512i low = _mm512_and_si512(i ? _mm512_srli_epi16(pairs, 4) : pairs, _mm512_set1_epi8(15));
    return (IVEC)_mm512_shuffle_epi8(values, low);
}
#endif

static INT8_TARGET void NAME(int8_unpack)(const uint8_t *codes, uint8_t *w) {
#if ISA == ISA_AVX512
    for (int g = 0; g < BLOCK / 8; g++) {
        ask_ahead(codes + g * NF4_BYTES / 8, NF4_BYTES / 8);
        for (int i = 0; i < 2; i++)
            for (int v = 0; v < VECTORS; v++)
                _mm512_storeu_si512(w + ((2 * g + i) * STRIP + v * LANES) * 4, (__m512i)NAME(code_weights)(codes, g, i, v));
    }
#elif ISA == ISA_AVX2
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)INT8_VALUES)), low = _mm256_set1_epi8(15);
    for (int at = 0; at < NF4_CODES; at += 32) {
        ask_ahead(codes + at, 1);
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
}

#define COLUMNS_int8 _Pragma("GCC unroll 1")
#define COLUMNS_code _Pragma("GCC unroll 2")
#define DEFINE_INT8_TILE(KIND, ROWS, WIDE) \
    static inline INT8_TARGET void NAME(KIND##_tile_##ROWS)(const int8_row *x, const uint8_t *w, const float *scale, float *y, int64_t ask) { \
        for (int first = 0; first < VECTORS; first += WIDE, scale += WIDE * LANES, y += WIDE * LANES, ask = 0) { \
            IVEC sums[ROWS][WIDE]; \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) sums[r][v] = iset1(x[r].start); \
            for (int pair = 0; pair < BLOCK / 8; pair++) { \
                ask_ahead(w + pair * ask, ask); \
                COLUMNS_##KIND for (int i = 0; i < 2; i++) { \
                    IVEC weights[WIDE]; \
                    _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) weights[v] = NAME(KIND##_weights)(w, pair, i, first + v); \
                    _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) { \
                        const IVEC values = iset1(x[r].dwords[2 * pair + i]); \
                        _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) \
                            sums[r][v] = idot(sums[r][v], weights[v], values); \
                    } \
                } \
            } \
            VEC scales[WIDE]; \
            _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) scales[v] = vload(scale + v * LANES); \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) { \
                const VEC of_row = vset1(x[r].scale); \
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) { \
                    float *to = y + r * STRIP + v * LANES; \
                    vstore(to, vfma(vmul(ifloat(sums[r][v]), of_row), scales[v], vload(to))); \
                } \
            } \
        } \
    }

#define DEFINE_INT8_BLOCK(KIND, TILES, HIGHEST) \
    TILES(DEFINE_INT8_TILE, KIND) \
    DEFINE_ROWS(KIND, INT8_TARGET, int8_row, 1, TILES, HIGHEST)

DEFINE_INT8_BLOCK(int8, TILES, TILE_ROWS)
#if ISA == ISA_AVX512
DEFINE_INT8_BLOCK(code, DECODING_TILES, DECODING_TILE_ROWS)
#endif

static INT8_TARGET void NAME(int8_strip)(const void *x, int64_t all_rows, int64_t rows, const uint8_t *strip, int64_t blocks,
                                         float *y) {
    _Alignas(64) uint8_t w[BLOCK * STRIP];
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *codes = strip + b * NF4_BYTES;
        const float *scale = (const float *)(codes + NF4_CODES);
        const int8_row *values = (const int8_row *)x + b * all_rows;
#if ISA == ISA_AVX512
        if (rows <= DECODING_ROWS) {
            NAME(code_block)(rows, values, codes, scale, y, NF4_BYTES / 8);
            continue;
        }
#endif
        NAME(int8_unpack)(codes, w);
        NAME(int8_block)(rows, values, w, scale, y, 0);
    }
}

#undef INT8_TARGET
#undef BYTES
#undef IVEC
#undef iload
#undef iset1
#undef idot
#undef ifloat
#undef DEFINE_INT8_TILE
#undef DEFINE_INT8_BLOCK
#undef DEFINE_TILE
#undef DEFINE_BLOCK
#undef DEFINE_ROWS
#undef RUN_TILE
#undef COLUMNS_f32
#undef COLUMNS_bf16
#undef COLUMNS_nf4
#undef COLUMNS_int8
#undef COLUMNS_code
#undef TILES
#undef TILE_ROWS
#undef DECODING_TILES
#undef DECODING_ROWS
#undef DECODING_TILE_ROWS
#undef VECTORS
