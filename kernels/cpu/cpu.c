/* What this processor and system can do. */
#if defined(__linux__)
#define _DEFAULT_SOURCE
#include <sys/mman.h>
#endif

#include "cpu.h"

/* The widest instruction set that processor and system support, as an ISA_ number. */
EXPORT int32_t loraplex_best_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return ISA_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return ISA_AVX2;
#endif
    return ISA_PORTABLE;
}

/* How many threads a parallel region gets when it asks for `threads`. */
EXPORT int32_t loraplex_threads(int32_t isa, int32_t threads) {
    int32_t counted = 0;
    (void)isa;
#pragma omp parallel num_threads(threads) reduction(+ : counted)
    counted += 1;
    return counted;
}

/* Ask for large pages where [memory, memory + bytes) is not touched yet: weights are read from end to end at every step. */
EXPORT int32_t loraplex_ask_large_pages(int32_t isa, int32_t threads, char *memory, int64_t bytes) {
    (void)isa, (void)threads;
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, from = ((uintptr_t)memory + page - 1) & ~(page - 1);
    const uintptr_t to = ((uintptr_t)memory + bytes) & ~(page - 1);
    if (to > from) (void)madvise((void *)from, to - from, MADV_HUGEPAGE); /* a system that has none goes on without */
#else
    (void)memory, (void)bytes;
#endif
    return 0;
}
