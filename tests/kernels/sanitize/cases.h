/* What the sanitizers' cases share: drawn numbers in memory of exactly their size, and sums in double to hold results
 * against. `make sanitize` builds one program of all; each source here runs one source of kernels/cpu. */
#ifndef LORAPLEX_CASES_H
#define LORAPLEX_CASES_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

void products(int32_t isa);
void deltas(int32_t isa);
void attention(int32_t isa);
void rows(int32_t isa);
void layer(int32_t isa);

static inline uint32_t drawn(void) {
    static uint32_t state = 1;
    return (state = state * 1664525u + 1013904223u) >> 8;
}

/* Between -1 and 1. */
static inline float *floats(int64_t count) {
    float *made = malloc((size_t)count * sizeof(float));
    for (int64_t i = 0; i < count; i++) made[i] = (float)(drawn() % 2001) / 1000 - 1;
    return made;
}

/* Cut to what bfloat16 holds. */
static inline void cut(float *numbers, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, numbers + i, sizeof bits);
        bits &= 0xffff0000;
        memcpy(numbers + i, &bits, sizeof bits);
    }
}

/* The numbers as a kernel is given them, in memory of their own: the upper halves of floats that were cut, or floats. */
static inline void *stored(const float *numbers, int64_t count, int bf16) {
    const size_t size = bf16 ? 2 : 4;
    char *made = malloc((size_t)count * size);
    for (int64_t i = 0; i < count; i++) memcpy(made + (size_t)i * size, (const char *)(numbers + i) + (4 - size), size);
    return made;
}

static inline void expect(const char *what, double got, double want, double bound) {
    if (fabs(got - want) <= bound) return;
    fprintf(stderr, "%s: %g, not %g\n", what, got, want);
    exit(1);
}

#endif
