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
    float held[LANES];
    vstore(held, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) held[i] = held[i] > held[i + width] ? held[i] : held[i + width];
    return held[0];
}

/* e^x to about one unit in the last place: 2^n e^r with |r| <= ln 2 / 2, n from adding 1.5 * 2^23 and taking it away.
 * Zero below -87.3 (no subnormal results), infinity above 88.7; NaN stays NaN. Polynomial: Cephes, expf. */
INLINE VEC NAME(vexp)(VEC x) {
    const VEC low = vset1(-87.3365f), high = vset1(88.7228f), shift = vset1(12582912.0f);
    const BITS under = (BITS)(x < low), over = (BITS)(x > high);
    const VEC inside = NAME(vselect)(under | over, vzero(), x);
    const VEC shifted = vfma(inside, vset1(1.44269504088896341f), shift);
    const VEC n = shifted - shift;
    VEC r = vfma(n, vset1(-0.693359375f), inside);
    r = vfma(n, vset1(2.12194440e-4f), r);
    VEC p = vset1(1.9875691500e-4f);
    p = vfma(p, r, vset1(1.3981999507e-3f));
    p = vfma(p, r, vset1(8.3334519073e-3f));
    p = vfma(p, r, vset1(4.1665795894e-2f));
    p = vfma(p, r, vset1(1.6666665459e-1f));
    p = vfma(p, r, vset1(5.0000001201e-1f));
    p = vfma(p, r * r, r) + vset1(1.0f);
    /* n runs from -126 to 128: two halves, so that neither power of two leaves the range of floats. */
    const BITS whole = (BITS)shifted - (BITS)shift, half = whole >> 1;
    const VEC first = (VEC)((half + 127) << 23), second = (VEC)((whole - half + 127) << 23);
    const VEC result = p * first * second;
    return NAME(vselect)(under, vzero(), NAME(vselect)(over, vset1(__builtin_inff()), result));
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
