/* A processor that has every instruction: what an emulated library answers in place of the real one (emulate.h). */
#include "cpu.h"

EXPORT int32_t loraplex_best_isa(void) { return ISA_AVX512; }

EXPORT int32_t loraplex_has_int8(int32_t isa, int32_t threads) {
    (void)isa, (void)threads;
    return 1;
}

EXPORT int32_t loraplex_has_bf16_dot(int32_t isa, int32_t threads) {
    (void)threads;
    return isa == ISA_AVX512;
}
