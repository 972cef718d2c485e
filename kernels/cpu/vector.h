/* One vector of floats by the name of VEC, for the instruction set that ISA names. Included once per instruction set,
 * before a kernel's body; vector_end.h takes it all back.
 *
 * vfma rounds once on AVX2 and AVX-512 and twice on the portable path, whose bits are therefore its own. */

#define VECTOR_JOIN_(a, b) a##_##b
#define VECTOR_JOIN(a, b) VECTOR_JOIN_(a, b)
#define NAME(name) VECTOR_JOIN(name, ISA_NAME)

#if ISA == ISA_AVX512

#define ISA_NAME avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define LANES 16
#define VEC __m512
#define vzero() _mm512_setzero_ps()
#define vset1(value) _mm512_set1_ps(value)
#define vload(from) _mm512_loadu_ps(from)
#define vstore(to, v) _mm512_storeu_ps(to, v)
#define vload_bf16(from) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(from))), 16))
#define vadd(a, b) _mm512_add_ps(a, b)
#define vmul(a, b) _mm512_mul_ps(a, b)
#define vmax(a, b) _mm512_max_ps(a, b)
#define vfma(a, b, c) _mm512_fmadd_ps(a, b, c)

#elif ISA == ISA_AVX2

#define ISA_NAME avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define VEC __m256
#define vzero() _mm256_setzero_ps()
#define vset1(value) _mm256_set1_ps(value)
#define vload(from) _mm256_loadu_ps(from)
#define vstore(to, v) _mm256_storeu_ps(to, v)
#define vload_bf16(from) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(from))), 16))
#define vadd(a, b) _mm256_add_ps(a, b)
#define vmul(a, b) _mm256_mul_ps(a, b)
#define vmax(a, b) _mm256_max_ps(a, b)
#define vfma(a, b, c) _mm256_fmadd_ps(a, b, c)

#else /* what any compiler makes of eight floats: SSE2, NEON or scalars */

#ifndef LORAPLEX_PORTABLE_VECTOR
#define LORAPLEX_PORTABLE_VECTOR
typedef float portable_vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t portable_half __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t portable_bits __attribute__((vector_size(32), aligned(4), may_alias));
static inline __attribute__((unused)) portable_vec portable_max(portable_vec a, portable_vec b) {
    const portable_bits larger = (portable_bits)(a > b);
    return (portable_vec)((larger & (portable_bits)a) | (~larger & (portable_bits)b));
}
#endif

#define ISA_NAME portable
#define TARGET
#define LANES 8
#define VEC portable_vec
#define vzero() ((portable_vec){0})
#define vset1(value) ((portable_vec){0} + (float)(value))
#define vload(from) (*(const portable_vec *)(from))
#define vstore(to, v) (*(portable_vec *)(to) = (v))
#define vload_bf16(from) \
    ((portable_vec)(__builtin_convertvector(*(const portable_half *)(from), portable_bits) << 16))
#define vadd(a, b) ((a) + (b))
#define vmul(a, b) ((a) * (b))
#define vmax(a, b) portable_max(a, b)
#define vfma(a, b, c) ((a) * (b) + (c))

#endif
