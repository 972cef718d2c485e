/* Sums over a vector's lanes and the functions that rows are made of, for the instruction set of the vector.h before it.
 *
 * One order of summation and one polynomial each, whatever stands in the other lanes. vector types of either compiler
 * take + - * / and, cast to BITS, & | ^ ~ << and comparisons; only what those cannot say is asked of the instruction set.
 */

#define BITS VECTOR_JOIN(bits, ISA_NAME)
typedef int32_t BITS __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline, unused)) TARGET

/* Hold a vector in a register, where the compiler would read it from memory again for every use. */
#if ISA == ISA_PORTABLE
#define KEEP(v)
#else
#define KEEP(v) __asm__("" : "+x"(v))
#endif

/* mask's lanes are all ones or all zeros. */
INLINE VEC NAME(vselect)(BITS mask, VEC yes, VEC no) {
    return (VEC)((mask & (BITS)yes) | (~mask & (BITS)no));
}

/* The first `count` lanes from memory, zeros in the others. */
INLINE VEC NAME(vload_part)(const float *from, int64_t count) {
    float held[LANES] = {0};
    __builtin_memcpy(held, from, (size_t)count * sizeof(float));
    return vload(held);
}

INLINE VEC NAME(vload_bf16_part)(const uint16_t *from, int64_t count) {
    uint16_t held[LANES] = {0};
    __builtin_memcpy(held, from, (size_t)count * sizeof(uint16_t));
    return vload_bf16(held);
}

INLINE void NAME(vstore_part)(float *to, VEC v, int64_t count) {
    float held[LANES];
    vstore(held, v);
    __builtin_memcpy(to, held, (size_t)count * sizeof(float));
}

/* The sum of the lanes of each of four vectors. */
INLINE void NAME(vsum4)(float *to, VEC a, VEC b, VEC c, VEC d) {
#if ISA == ISA_PORTABLE
    const VEC each[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        const VEC v = each[i];
        to[i] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
#else
#if ISA == ISA_AVX512
#define HALVES(v) _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))
#else
#define HALVES(v) (v)
#endif
    const __m256 ab = _mm256_hadd_ps(HALVES(a), HALVES(b)), cd = _mm256_hadd_ps(HALVES(c), HALVES(d));
    const __m256 quarters = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
#undef HALVES
#endif
}

INLINE float NAME(vsum)(VEC v) {
    float held[4];
    NAME(vsum4)(held, v, v, v, v);
    return held[0];
}

INLINE float NAME(vhighest)(VEC v) {
#if ISA == ISA_PORTABLE
    float held[LANES];
    vstore(held, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) held[i] = held[i] > held[i + width] ? held[i] : held[i + width];
    return held[0];
#else
#if ISA == ISA_AVX512
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
    const __m256 half = v;
#endif
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#endif
}

/* Exchange the rows and columns of a square of LANES vectors. */
INLINE void NAME(vtranspose)(VEC *rows) {
#if ISA == ISA_PORTABLE
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            const float held = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = held;
        }
#else
#if ISA == ISA_AVX512
#define PAIRS(end, a, b) _mm512_unpack##end##_ps(a, b)
#define QUADS(end, a, b) _mm512_castpd_ps(_mm512_unpack##end##_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)))
#define QUARTERS(a, b, which) (VEC)_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), which)
#define EVEN(a, b) QUARTERS(a, b, 0x88) /* quarters 0 and 2 of both */
#define ODD(a, b) QUARTERS(a, b, 0xdd)
#else
#define PAIRS(end, a, b) _mm256_unpack##end##_ps(a, b)
#define QUADS(end, a, b) _mm256_castpd_ps(_mm256_unpack##end##_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)))
#endif
    VEC held[LANES]; /* of each four rows, four numbers of each row in every quarter, or half, are transposed */
    for (int i = 0; i < LANES; i += 4) {
        const VEC a = PAIRS(lo, rows[i], rows[i + 1]), b = PAIRS(hi, rows[i], rows[i + 1]);
        const VEC c = PAIRS(lo, rows[i + 2], rows[i + 3]), d = PAIRS(hi, rows[i + 2], rows[i + 3]);
        held[i] = QUADS(lo, a, c), held[i + 1] = QUADS(hi, a, c);
        held[i + 2] = QUADS(lo, b, d), held[i + 3] = QUADS(hi, b, d);
    }
    for (int i = 0; i < 4; i++) {
#if ISA == ISA_AVX512
        const VEC a = EVEN(held[i], held[i + 4]), b = ODD(held[i], held[i + 4]);
        const VEC c = EVEN(held[i + 8], held[i + 12]), d = ODD(held[i + 8], held[i + 12]);
        rows[i] = EVEN(a, c), rows[i + 8] = ODD(a, c);
        rows[i + 4] = EVEN(b, d), rows[i + 12] = ODD(b, d);
#else
        rows[i] = _mm256_permute2f128_ps(held[i], held[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(held[i], held[i + 4], 0x31);
#endif
    }
#undef PAIRS
#undef QUADS
#undef QUARTERS
#undef EVEN
#undef ODD
#endif
}

/* e^(x - n ln 2) where that is near 1. Polynomial: Cephes, expf. */
INLINE VEC NAME(vexp_near)(VEC x, VEC n) {
    VEC r = vfma(n, vset1(-0.693359375f), x);
    r = vfma(n, vset1(2.12194440e-4f), r);
    VEC p = vset1(1.9875691500e-4f);
    p = vfma(p, r, vset1(1.3981999507e-3f));
    p = vfma(p, r, vset1(8.3334519073e-3f));
    p = vfma(p, r, vset1(4.1665795894e-2f));
    p = vfma(p, r, vset1(1.6666665459e-1f));
    p = vfma(p, r, vset1(5.0000001201e-1f));
    return vfma(p, r * r, r) + vset1(1.0f);
}

/* e^x to about one unit in the last place: 2^n e^r with |r| <= ln 2 / 2, n from adding 1.5 * 2^23 and taking it away.
 * Zero below -87.3 (no subnormal results), infinity above 88.7; NaN stays NaN. */
INLINE VEC NAME(vexp)(VEC x) {
    const VEC low = vset1(-87.3365f), high = vset1(88.7228f), shift = vset1(12582912.0f);
    const BITS under = (BITS)(x < low), over = (BITS)(x > high);
    const VEC inside = NAME(vselect)(under | over, vzero(), x);
    const VEC shifted = vfma(inside, vset1(1.44269504088896341f), shift);
    const VEC p = NAME(vexp_near)(inside, shifted - shift);
    /* n runs from -126 to 128: two halves, so that neither power of two leaves the range of floats. */
    const BITS whole = (BITS)shifted - (BITS)shift, half = whole >> 1;
    const VEC first = (VEC)((half + 127) << 23), second = (VEC)((whole - half + 127) << 23);
    const VEC result = p * first * second;
    return NAME(vselect)(under, vzero(), NAME(vselect)(over, vset1(__builtin_inff()), result));
}

/* e^x where x is not above zero, with fewer steps: zero below -87.7, NaN stays NaN. The sum's lowest bits are n + 127, the
 * power's exponent, which makes it zero for the lowest n. */
INLINE VEC NAME(vexp_down)(VEC x) {
    const VEC shift = vset1(12582912.0f + 127.0f), inside = vmax(vset1(-88.029692f), x);
    const VEC shifted = vfma(inside, vset1(1.44269504088896341f), shift);
    const VEC power = (VEC)((BITS)shifted << 23);
    return NAME(vexp_near)(inside, shifted - shift) * power;
}

/* tanh x: near zero x + x^3 P(x^2), else from e^(2|x|). Polynomial: Cephes, tanhf. */
INLINE VEC NAME(vtanh)(VEC x) {
    const BITS sign_bit = (BITS){0} | INT32_MIN;
    const BITS sign = (BITS)x & sign_bit;
    const VEC magnitude = (VEC)((BITS)x & ~sign_bit), square = x * x;
    VEC p = vset1(-5.70498872745e-3f);
    p = vfma(p, square, vset1(2.06390887954e-2f));
    p = vfma(p, square, vset1(-5.37397155531e-2f));
    p = vfma(p, square, vset1(1.33314422036e-1f));
    p = vfma(p, square, vset1(-3.33332819422e-1f));
    const VEC near = vfma(p * square, x, x);
    const VEC far = vset1(1.0f) - vset1(2.0f) / (NAME(vexp)(magnitude + magnitude) + vset1(1.0f));
    return NAME(vselect)((BITS)(magnitude < vset1(0.625f)), near, (VEC)((BITS)far | sign));
}
