/* Put before every source of the library by `make emulate`: AVX-512 and the dot products of bytes in terms of AVX2, by
 * SIMDe (https://github.com/simd-everywhere/simde), so that those kernels run where no processor has the instructions.
 *
 * SIMDe has the intrinsics; here are the few it lacks (0.7.4), and what a compiler would otherwise make of the real
 * instructions: the `target` attributes, and the assembly that holds a vector in one register. What it cannot show is
 * speed, and whether the compiler's own code for these instructions is right. */
#ifndef LORAPLEX_EMULATE_H
#define LORAPLEX_EMULATE_H

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "a fused product is rounded once: compile with -mavx2 -mfma -mf16c"
#endif

/* The system's headers come first: they say `__asm__` too. */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#undef _DEFAULT_SOURCE /* a source may ask for it too */

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#if !defined(SIMDE_X86_AVX512F_ENABLE_NATIVE_ALIASES)
#error "this build would run the real instructions: nothing is emulated"
#endif

#undef _mm512_extractf32x8_ps /* without optimization the compiler has it as a macro */
#define _mm512_extractf32x8_ps(a, which) emulated_half(a, which)
static inline __m256 emulated_half(simde__m512 a, int which) { return simde__m512_to_private(a).m256[which]; }

#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(a) emulated_widened(a)
static inline simde__m512i emulated_widened(__m256i a) {
    simde__m512i_private result;
    result.m256i[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a));
    result.m256i[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1));
    return simde__m512i_from_private(result);
}

#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(a) emulated_floats(a)
static inline simde__m512 emulated_floats(simde__m512i a) {
    const simde__m512i_private from = simde__m512i_to_private(a);
    simde__m512_private result;
    for (int half = 0; half < 2; half++) result.m256[half] = _mm256_cvtepi32_ps(from.m256i[half]);
    return simde__m512_from_private(result);
}

/* AVX-VNNI's name of what SIMDe has as AVX-512 VNNI's. */
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32(sum, a, b) simde_mm256_dpbusd_epi32(sum, a, b)

#define target(...) unused
#define __asm__(...)

/* What the processor has is not asked: processor.c answers in its place. */
#define loraplex_best_isa processors_best_isa
#define loraplex_has_int8 processors_has_int8
#define loraplex_has_bf16_dot processors_has_bf16_dot

#endif
