/* Runs the products over matrices of odd sizes that lie in memory of exactly their size, for the sanitizers to watch:
 * `make sanitize`, or tests/kernels/test_sanitize.py. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "linear.c"

int32_t loraplex_best_isa(void);
int32_t loraplex_ask_large_pages(int32_t isa, int32_t threads, char *memory, int64_t bytes);

static uint32_t state = 1;
static uint32_t draw(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

static float *floats(int64_t count) {
    float *made = malloc(count * sizeof(float));
    for (int64_t i = 0; i < count; i++) made[i] = (float)(draw() % 2001) / 1000 - 1;
    return made;
}

static void expect_near(const char *what, const float *y, const float *x, const float *w, const float *bias, int64_t rows,
                        int64_t n, int64_t k, double bound) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < n; i++) {
            double sum = bias ? bias[i] : 0;
            for (int64_t j = 0; j < k; j++) sum += (double)x[row * k + j] * w[i * k + j];
            if (!(fabs(sum - y[row * n + i]) <= bound * sqrt((double)k))) {
                fprintf(stderr, "%s: [%ld, %ld] is %g, not %g\n", what, (long)row, (long)i, y[row * n + i], sum);
                exit(1);
            }
        }
}

static void codes_case(int32_t isa, int64_t rows, int64_t n, int64_t k) {
    const int64_t bytes = strips_of(n) * blocks_of(k) * NF4_BYTES;
    uint8_t *codes = malloc(n * k / 2), *packed = malloc(bytes);
    float *absmax = floats(n * k / 64), *x = floats(rows * k), *bias = floats(n), *w = malloc(n * k * sizeof(float));
    float *y = malloc(rows * n * sizeof(float));
    for (int64_t i = 0; i < n * k / 2; i++) codes[i] = (uint8_t)draw();
    for (int64_t i = 0; i < n * k; i++)
        w[i] = NF4_VALUES[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * absmax[i / 64];
    loraplex_ask_large_pages(isa, 2, (char *)packed, bytes);
    loraplex_pack_nf4(isa, 2, codes, absmax, packed, n, k);
    loraplex_nf4_linear(isa, 2, x, packed, bias, y, rows, n, k);
    expect_near("nf4", y, x, w, bias, rows, n, k, 1e-5);
    if (loraplex_has_int8(isa, 2)) {
        loraplex_pack_int8(isa, 2, codes, absmax, packed, n, k);
        loraplex_int8_linear(isa, 2, x, packed, NULL, y, rows, n, k);
        expect_near("int8", y, x, w, NULL, rows, n, k, 3e-2);
    }
    free(codes), free(packed), free(absmax), free(x), free(bias), free(w), free(y);
}

static void plain_case(int32_t isa, int64_t rows, int64_t n, int64_t k) {
    const int64_t blocks = strips_of(n) * blocks_of(k);
    float *w = floats(n * k), *x = floats(rows * k), *y = malloc(rows * n * sizeof(float));
    uint16_t *halves = malloc(n * k * 2);
    uint8_t *packed = malloc(blocks * F32_BYTES);
    loraplex_pack_f32(isa, 2, (const uint32_t *)w, (uint32_t *)packed, n, k);
    loraplex_f32_linear(isa, 2, x, packed, NULL, y, rows, n, k);
    expect_near("f32", y, x, w, NULL, rows, n, k, 1e-5);
    free(packed);
    packed = malloc(blocks * BF16_BYTES);
    for (int64_t i = 0; i < n * k; i++) {
        uint32_t bits;
        memcpy(&bits, w + i, 4);
        bits &= 0xffff0000;
        memcpy(w + i, &bits, 4);
        halves[i] = (uint16_t)(bits >> 16);
    }
    loraplex_pack_bf16(isa, 2, halves, (uint16_t *)packed, n, k);
    loraplex_bf16_linear(isa, 2, x, packed, NULL, y, rows, n, k);
    expect_near("bf16", y, x, w, NULL, rows, n, k, 1e-5);
    free(w), free(x), free(y), free(halves), free(packed);
}

int main(void) {
    const int64_t rows[] = {1, 2, 3, 5, 6, 7, 13, 130}, outs[] = {1, 32, 33, 95}, insides[] = {64, 192};
    for (int32_t isa = ISA_PORTABLE; isa <= loraplex_best_isa(); isa++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
            for (size_t n = 0; n < sizeof outs / sizeof *outs; n++)
                for (size_t k = 0; k < sizeof insides / sizeof *insides; k++) {
                    codes_case(isa, rows[r], outs[n], insides[k]);
                    plain_case(isa, rows[r], outs[n], insides[k] - (int64_t)n);
                }
    puts("clean");
    return 0;
}
