/* The products: matrices whose rows fill no strip, and any number of rows of x. */
#include "cases.h"
#include "functions.h"
#include "packed.h"

int32_t loraplex_ask_large_pages(int32_t isa, int32_t threads, char *memory, int64_t bytes);
int32_t loraplex_has_int8(int32_t isa, int32_t threads);
int32_t loraplex_has_bf16_dot(int32_t isa, int32_t threads);
int32_t loraplex_pack_nf4(int32_t, int32_t, const uint8_t *, const float *, uint8_t *, int64_t n, int64_t k);
int32_t loraplex_pack_int8(int32_t, int32_t, const uint8_t *, const float *, uint8_t *, int64_t n, int64_t k);
int32_t loraplex_pack_bf16(int32_t, int32_t, const uint16_t *, uint16_t *, int64_t n, int64_t k);
int32_t loraplex_pack_bf16_dot(int32_t, int32_t, const uint16_t *, uint16_t *, int64_t n, int64_t k);
int32_t loraplex_pack_f32(int32_t, int32_t, const uint32_t *, uint32_t *, int64_t n, int64_t k);

static int64_t blocks_of_matrix(int64_t n, int64_t k) { return (n + STRIP - 1) / STRIP * ((k + BLOCK - 1) / BLOCK); }

static void expect_product(const char *what, const float *y, const float *x, const float *w, const float *bias, int64_t rows,
                           int64_t n, int64_t k, double bound) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < n; i++) {
            double sum = bias ? bias[i] : 0;
            for (int64_t j = 0; j < k; j++) sum += (double)x[row * k + j] * w[i * k + j];
            expect(what, y[row * n + i], sum, bound * sqrt((double)k));
        }
}

static void codes_case(int32_t isa, int64_t rows, int64_t n, int64_t k) {
    const int64_t bytes = blocks_of_matrix(n, k) * NF4_BYTES;
    uint8_t *codes = malloc(n * k / 2), *packed = malloc(bytes);
    float *absmax = floats(n * k / BLOCK), *x = floats(rows * k), *bias = floats(n), *w = malloc(n * k * sizeof(float));
    float *y = malloc(rows * n * sizeof(float));
    for (int64_t i = 0; i < n * k / 2; i++) codes[i] = (uint8_t)drawn();
    for (int64_t i = 0; i < n * k; i++)
        w[i] = NF4_VALUES[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * absmax[i / BLOCK];
    loraplex_ask_large_pages(isa, 2, (char *)packed, bytes);
    loraplex_pack_nf4(isa, 2, codes, absmax, packed, n, k);
    loraplex_nf4_linear(isa, 2, x, packed, bias, y, rows, n, k);
    expect_product("nf4", y, x, w, bias, rows, n, k, 1e-5);
    if (loraplex_has_int8(isa, 2)) {
        loraplex_pack_int8(isa, 2, codes, absmax, packed, n, k);
        loraplex_int8_linear(isa, 2, x, packed, NULL, y, rows, n, k);
        expect_product("int8", y, x, w, NULL, rows, n, k, 3e-2);
    }
    free(codes), free(packed), free(absmax), free(x), free(bias), free(w), free(y);
}

static void plain_case(int32_t isa, int64_t rows, int64_t n, int64_t k) {
    const int64_t blocks = blocks_of_matrix(n, k);
    float *w = floats(n * k), *x = floats(rows * k), *y = malloc(rows * n * sizeof(float));
    uint8_t *packed = malloc(blocks * F32_BYTES);
    loraplex_pack_f32(isa, 2, (const uint32_t *)w, (uint32_t *)packed, n, k);
    loraplex_f32_linear(isa, 2, x, packed, NULL, y, rows, n, k);
    expect_product("f32", y, x, w, NULL, rows, n, k, 1e-5);
    free(packed);
    packed = malloc(blocks * BF16_BYTES);
    cut(w, n * k);
    uint16_t *halves = stored(w, n * k, 1);
    loraplex_pack_bf16(isa, 2, halves, (uint16_t *)packed, n, k);
    loraplex_bf16_linear(isa, 2, x, packed, NULL, y, rows, n, k);
    expect_product("bf16", y, x, w, NULL, rows, n, k, 1e-5);
    if (isa != ISA_AVX512 || loraplex_has_bf16_dot(isa, 2)) {
        loraplex_pack_bf16_dot(isa, 2, halves, (uint16_t *)packed, n, k);
        loraplex_bf16_dot_linear(isa, 2, x, packed, NULL, y, rows, n, k);
        expect_product("bf16_dot", y, x, w, NULL, rows, n, k, 1e-2);
    }
    free(w), free(x), free(y), free(halves), free(packed);
}

void products(int32_t isa) {
    const int64_t rows[] = {1, 2, 3, 5, 6, 7, 13, 130}, outs[] = {1, 32, 33, 95}, insides[] = {64, 192};
    for (int64_t r = 0; r < COUNT(rows); r++)
        for (int64_t n = 0; n < COUNT(outs); n++)
            for (int64_t k = 0; k < COUNT(insides); k++) {
                codes_case(isa, rows[r], outs[n], insides[k]);
                plain_case(isa, rows[r], outs[n], insides[k] - n);
            }
}
