/* NF4 codes to floats, and a strip's product. See packed.h for the layout, tile_body.h for the order of the sums. */

#if ISA == ISA_AVX512

/* A permutation looks at no more than the lowest four bits of a dword. */
static inline TARGET VEC NAME(nf4_weights)(const void *codes, int g, int i, int v) {
    const __m512i dwords = _mm512_loadu_si512((const uint8_t *)codes + (g * STRIP + v * LANES) * 4);
    const int shift = i < 4 ? 8 * i : 8 * (i - 4) + 4;
    return _mm512_permutexvar_ps(shift ? _mm512_srli_epi32(dwords, shift) : dwords, _mm512_loadu_ps(NF4_VALUES));
}

DEFINE_BLOCK(nf4, DECODING_TILES, DECODING_TILE_ROWS)

/* One row of x and two strips at a time, `apart` bytes between them and `y_apart` between their sums: a value is broadcast
 * for both, and memory serves two streams. The same sums as a tile's, in the same order. */
static TARGET void NAME(nf4_pair)(
    const float *x, const uint8_t *strip, int64_t apart, int64_t blocks, float *y, int64_t y_apart
) {
    for (int64_t b = 0; b < blocks; b++, x += BLOCK, strip += NF4_BYTES) {
        const uint8_t *codes[2] = {strip, strip + apart};
        VEC sums[2][VECTORS];
        _Pragma("GCC unroll 2") for (int s = 0; s < 2; s++)
            _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++) sums[s][v] = vzero();
        for (int g = 0; g < BLOCK / 8; g++) {
            for (int s = 0; s < 2; s++) ask_ahead(codes[s] + g * NF4_BYTES / 8, NF4_BYTES / 8);
            _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {
                const VEC value = vset1(x[8 * g + i]);
                _Pragma("GCC unroll 2") for (int s = 0; s < 2; s++)
                    _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++)
                        sums[s][v] = vfma(NAME(nf4_weights)(codes[s], g, i, v), value, sums[s][v]);
            }
        }
        _Pragma("GCC unroll 2") for (int s = 0; s < 2; s++)
            _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++) {
                float *to = y + s * y_apart + v * LANES;
                vstore(to, vfma(sums[s][v], vload((const float *)(codes[s] + NF4_CODES) + v * LANES), vload(to)));
            }
    }
}

static TARGET void NAME(unpack)(const uint8_t *codes, float *w) {
    for (int g = 0; g < BLOCK / 8; g++) {
        ask_ahead(codes + g * NF4_BYTES / 8, NF4_BYTES / 8);
        _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++)
            _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++)
                vstore(w + (8 * g + i) * STRIP + v * LANES, NAME(nf4_weights)(codes, g, i, v));
    }
}

#elif ISA == ISA_AVX2

/* A float's four bytes are looked up apart, 32 codes at a time, and interleaved: AVX2 permutes no more than 8 floats. */
typedef struct {
    __m256i byte[4];
    __m256i up, down; /* factors that shift; opaque: a compiler that knows them makes shifts, on a shuffle's port */
} byte_tables;

static inline TARGET byte_tables tables_of_values(void) {
    byte_tables tables;
    for (int p = 0; p < 4; p++) {
        uint8_t bytes[16];
        for (int c = 0; c < 16; c++) bytes[c] = ((const uint8_t *)&NF4_VALUES[c])[p];
        tables.byte[p] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)bytes));
    }
    tables.up = _mm256_set1_epi32(1 << 16);
    tables.down = _mm256_set1_epi16(1 << 12);
    __asm__("" : "+x"(tables.up), "+x"(tables.down));
    return tables;
}

/* The high nibble of each byte, by a multiplication. */
static inline TARGET __m256i high_nibbles(byte_tables tables, __m256i pairs) {
    return _mm256_and_si256(_mm256_mulhi_epu16(pairs, tables.down), _mm256_set1_epi8(15));
}

/* w[v] are rows 8v .. 8v + 7. Half of the last step is made of multiplications and blends, which have execution ports of
 * their own beside the shuffles that all the rest is made of. */
static inline TARGET void floats_of_codes(byte_tables tables, __m256i codes, __m256 w[4]) {
    const __m256i p0 = _mm256_shuffle_epi8(tables.byte[0], codes), p1 = _mm256_shuffle_epi8(tables.byte[1], codes);
    const __m256i p2 = _mm256_shuffle_epi8(tables.byte[2], codes), p3 = _mm256_shuffle_epi8(tables.byte[3], codes);
    const __m256i low01 = _mm256_unpacklo_epi8(p0, p1), low23 = _mm256_unpacklo_epi8(p2, p3);
    const __m256i high01 = _mm256_unpackhi_epi8(p0, p1), high23 = _mm256_unpackhi_epi8(p2, p3);
    w[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23));
    w[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23));
    w[2] = _mm256_castsi256_ps(_mm256_blend_epi16(high01, _mm256_mullo_epi32(high23, tables.up), 0xaa));
    w[3] = _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_madd_epi16(high01, tables.up), high23, 0xaa));
}

static inline TARGET void NAME(unpack)(const uint8_t *codes, float *w) {
    const byte_tables tables = tables_of_values();
    const __m256i low = _mm256_set1_epi8(15);
    const uint8_t *ask = codes;
    for (int half = 0; half < STRIP; half += HALF)
        for (int j = 0; j < BLOCK / 2; j++, codes += HALF, ask += NF4_BYTES / BLOCK) {
            const __m256i pair = _mm256_loadu_si256((const void *)codes);
            ask_ahead(ask, 1);
            __m256 first[4], second[4];
            floats_of_codes(tables, high_nibbles(tables, pair), first);
            floats_of_codes(tables, _mm256_and_si256(pair, low), second);
            float *to = w + 2 * j * STRIP + half;
            for (int v = 0; v < 4; v++) {
                vstore(to + v * LANES, first[v]);
                vstore(to + STRIP + v * LANES, second[v]);
            }
        }
}

/* One row of x or two: products straight from the registers that unpacking fills. x: [blocks][all_rows][BLOCK]. */
static inline __attribute__((always_inline)) TARGET void NAME(nf4_rows)(
    const float *x, int64_t all_rows, const uint8_t *strip, int64_t blocks, float *y, const int rows
) {
    const byte_tables tables = tables_of_values();
    const __m256i low = _mm256_set1_epi8(15);
    for (int64_t b = 0; b < blocks; b++, x += all_rows * BLOCK) {
        const uint8_t *codes = strip + b * NF4_BYTES, *ask = codes;
        const float *scale = (const float *)(codes + NF4_CODES);
        for (int half = 0; half < STRIP; half += HALF, scale += HALF) {
            VEC sums[2][4], w[4];
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < 4; v++) sums[r][v] = vzero();
            for (int j = 0; j < BLOCK / 2; j++, codes += HALF, ask += NF4_BYTES / BLOCK) {
                const __m256i pair = _mm256_loadu_si256((const void *)codes);
                ask_ahead(ask, 1);
                for (int i = 0; i < 2; i++) {
                    floats_of_codes(tables, i ? _mm256_and_si256(pair, low) : high_nibbles(tables, pair), w);
                    for (int r = 0; r < rows; r++) {
                        const VEC value = vset1(x[r * BLOCK + 2 * j + i]);
                        for (int v = 0; v < 4; v++) sums[r][v] = vfma(w[v], value, sums[r][v]);
                    }
                }
            }
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < 4; v++) {
                    float *to = y + r * STRIP + half + v * LANES;
                    vstore(to, vfma(sums[r][v], vload(scale + v * LANES), vload(to)));
                }
        }
    }
}

static TARGET void NAME(nf4_one)(const float *x, int64_t all_rows, const uint8_t *strip, int64_t blocks, float *y) {
    NAME(nf4_rows)(x, all_rows, strip, blocks, y, 1);
}

static TARGET void NAME(nf4_two)(const float *x, int64_t all_rows, const uint8_t *strip, int64_t blocks, float *y) {
    NAME(nf4_rows)(x, all_rows, strip, blocks, y, 2);
}

#else

static void NAME(unpack)(const uint8_t *codes, float *w) {
    for (int half = 0; half < STRIP; half += HALF, w += HALF)
        for (int j = 0; j < BLOCK / 2; j++, codes += HALF)
            for (int r = 0; r < HALF; r++) {
                const uint8_t pair = codes[PLACE(r)];
                w[2 * j * STRIP + r] = NF4_VALUES[pair >> 4];
                w[(2 * j + 1) * STRIP + r] = NF4_VALUES[pair & 15];
            }
}

#endif

/* y[r][n] += sum over blocks of scale[n] * (w . x[r]). x: [blocks][all_rows][BLOCK], of which `rows` are taken. */
static TARGET void NAME(nf4_strip)(const void *x, int64_t all_rows, int64_t rows, const uint8_t *strip, int64_t blocks,
                                   float *y) {
#if ISA == ISA_AVX2
    if (rows <= 2) {
        (rows == 1 ? NAME(nf4_one) : NAME(nf4_two))((const float *)x, all_rows, strip, blocks, y);
        return;
    }
#endif
    _Alignas(64) float w[BLOCK * STRIP];
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *block = strip + b * NF4_BYTES;
        const float *values = (const float *)x + b * all_rows * BLOCK, *scale = (const float *)(block + NF4_CODES);
#if ISA == ISA_AVX512
        if (rows <= DECODING_ROWS) {
            NAME(nf4_block)(rows, values, block, scale, y, NF4_BYTES / 8);
            continue;
        }
#endif
        NAME(unpack)(block, w);
        NAME(f32_block)(rows, values, w, scale, y, 0);
    }
}
