/* What every source here begins with: how a function is exported, the instruction sets a kernel is built for, bfloat16. */
#ifndef LORAPLEX_CPU_H
#define LORAPLEX_CPU_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* In rising order: a table of kernels is indexed by these, and library.py has the same numbers. */
#define ISA_PORTABLE 0
#define ISA_AVX2 1   /* with FMA and F16C: every x86 server since 2013 */
#define ISA_AVX512 2 /* F, BW, DQ, VL */

#if defined(__x86_64__)
#include <immintrin.h>
#define ISA_TABLE(name) {name##_portable, name##_avx2, name##_avx512}
#else
#define ISA_TABLE(name) {name##_portable, name##_portable, name##_portable}
#endif

/* Whether this processor looks values up in a unit that does not multiply, as AMD's do, or in one of the two that do, as
 * Intel's. Tests define it, to see both. */
#if !defined(LOOKS_UP_ASIDE) && defined(__x86_64__)
#define LOOKS_UP_ASIDE __builtin_cpu_is("amd")
#elif !defined(LOOKS_UP_ASIDE)
#define LOOKS_UP_ASIDE 0
#endif

/* To the nearest bfloat16, ties to even. */
static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays one */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
