/* y = x @ W.T + bias, for weights packed as packed.h says: NF4 codes, bfloat16 or floats, exact in float. */
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "packed.h"

static const float ONES[STRIP] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                  1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

#define ISA ISA_PORTABLE
#include "vector.h"
#include "tile_body.h"
#include "nf4_body.h"
#include "dense_body.h"
#include "vector_end.h"
#if defined(__x86_64__)
#define ISA ISA_AVX2
#include "vector.h"
#include "tile_body.h"
#include "nf4_body.h"
#include "dense_body.h"
#include "vector_end.h"
#define ISA ISA_AVX512
#include "vector.h"
#include "tile_body.h"
#include "nf4_body.h"
#include "dense_body.h"
#include "vector_end.h"
#endif

#define CHUNK 128        /* rows whose sums a thread keeps at hand */
#define GROUP 4          /* strips that a thread takes together, so that x is read once for all of them */
#define NEAR (256 << 10) /* bytes of x that a group of strips reads at a time: half of a level 2 cache */

typedef void (*strip_fn)(const float *x, int64_t all_rows, int64_t rows, const uint8_t *strip, int64_t blocks, float *y);
static const strip_fn nf4_strips[] = ISA_TABLE(nf4_strip);
static const strip_fn bf16_strips[] = ISA_TABLE(bf16_strip);
static const strip_fn f32_strips[] = ISA_TABLE(f32_strip);

static int64_t strips_of(int64_t n) { return (n + STRIP - 1) / STRIP; }
static int64_t blocks_of(int64_t k) { return (k + BLOCK - 1) / BLOCK; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void pack_pairs(const uint8_t *from, int64_t r, uint8_t *to) {
    for (int j = 0; j < BLOCK / 2; j++) to[j * STRIP + PLACE(r)] = from[j];
}

static void pack_dwords(const uint8_t *from, int64_t r, uint8_t *to) {
    for (int g = 0; g < BLOCK / 8; g++)
        for (int i = 0; i < 4; i++) {
            const uint8_t first = from[4 * g + i / 2], fifth = from[4 * g + 2 + i / 2];
            to[(g * STRIP + r) * 4 + i] = i % 2 ? (first & 15) | (fifth & 15) << 4 : first >> 4 | (fifth & 0xf0);
        }
}

/* codes: [n, k / 2] and absmax: [n, k / 64] as bitsandbytes has them; k a multiple of 64. packed: [strips, blocks, NF4_BYTES]. */
EXPORT int32_t loraplex_pack_nf4(int32_t isa, int32_t threads, const uint8_t *codes, const float *absmax, uint8_t *packed,
                                 int64_t n, int64_t k) {
    const int64_t blocks = k / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t s = 0; s < strips_of(n); s++)
        for (int64_t b = 0; b < blocks; b++) {
            uint8_t *to = packed + (s * blocks + b) * NF4_BYTES;
            float *scale = (float *)(to + NF4_CODES);
            memset(to, 0, NF4_BYTES);
            for (int64_t r = 0; r < least(STRIP, n - s * STRIP); r++) {
                const int64_t at = (s * STRIP + r) * blocks + b;
                scale[r] = absmax[at];
                (isa == ISA_AVX512 ? pack_dwords : pack_pairs)(codes + at * (BLOCK / 2), r, to);
            }
        }
    return 0;
}

/* [n, k] to [strips, blocks, BLOCK, STRIP], for elements of one size; zeros past the matrix. */
#define PACK_PLAIN(weight, packed, n, k, threads) \
    _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t s = 0; s < strips_of(n); s++) \
        for (int64_t b = 0; b < blocks_of(k); b++) \
            for (int64_t r = 0; r < STRIP; r++) \
                for (int64_t i = 0; i < BLOCK; i++) { \
                    const int64_t row = s * STRIP + r, column = b * BLOCK + i; \
                    packed[((s * blocks_of(k) + b) * BLOCK + i) * STRIP + r] = \
                        row < n && column < k ? weight[row * k + column] : 0; \
                }

/* weight: [n, k] bfloat16. packed: [strips, blocks, BF16_BYTES]. */
EXPORT int32_t loraplex_pack_bf16(int32_t isa, int32_t threads, const uint16_t *weight, uint16_t *packed, int64_t n, int64_t k) {
    (void)isa;
    PACK_PLAIN(weight, packed, n, k, threads)
    return 0;
}

/* weight: [n, k] float. packed: [strips, blocks, F32_BYTES]. */
EXPORT int32_t loraplex_pack_f32(int32_t isa, int32_t threads, const uint32_t *weight, uint32_t *packed, int64_t n, int64_t k) {
    (void)isa;
    PACK_PLAIN(weight, packed, n, k, threads)
    return 0;
}

typedef struct {
    strip_fn strip;
    int64_t block_bytes;
    const uint8_t *packed;
    const float *x; /* [blocks, rows, BLOCK] */
    const float *bias;
    float *y;
    int64_t rows, n, blocks;
} product;

/* One row of x [rows, k] to its places in [blocks, rows, BLOCK], so that what a tile reads lies side by side. */
static void gather_row(const float *x, int64_t row, int64_t rows, int64_t k, float *out) {
    for (int64_t b = 0; b < blocks_of(k); b++) {
        const int64_t count = least(BLOCK, k - b * BLOCK);
        float *to = out + (b * rows + row) * BLOCK;
        memcpy(to, x + row * k + b * BLOCK, count * sizeof(float));
        memset(to + count, 0, (BLOCK - count) * sizeof(float));
    }
}

static void start_sums(const product *p, int64_t s, int64_t rows, float *sums) {
    memset(sums, 0, rows * STRIP * sizeof(float));
    if (p->bias)
        for (int64_t r = 0; r < rows; r++)
            memcpy(sums + r * STRIP, p->bias + s * STRIP, least(STRIP, p->n - s * STRIP) * sizeof(float));
}

static void write_sums(const product *p, int64_t s, int64_t row, int64_t rows, const float *sums) {
    for (int64_t r = 0; r < rows; r++)
        memcpy(p->y + (row + r) * p->n + s * STRIP, sums + r * STRIP, least(STRIP, p->n - s * STRIP) * sizeof(float));
}

/* The columns of y from strip `from` up to `to`, whose sums stay in `sums` [GROUP, CHUNK, STRIP] until they are whole. */
static void multiply_strips(const product *p, int64_t from, int64_t to, float *sums) {
    for (int64_t row = 0; row < p->rows; row += CHUNK) {
        const int64_t rows = least(CHUNK, p->rows - row);
        const int64_t near = NEAR / (int64_t)sizeof(float) / BLOCK / rows;
        for (int64_t s = from; s < to; s++) start_sums(p, s, rows, sums + (s - from) * CHUNK * STRIP);
        for (int64_t b = 0; b < p->blocks; b += near)
            for (int64_t s = from; s < to; s++)
                p->strip(p->x + (b * p->rows + row) * BLOCK, p->rows, rows,
                         p->packed + (s * p->blocks + b) * p->block_bytes, least(near, p->blocks - b),
                         sums + (s - from) * CHUNK * STRIP);
        for (int64_t s = from; s < to; s++) write_sums(p, s, row, rows, sums + (s - from) * CHUNK * STRIP);
    }
}

static int32_t multiply(product p, int32_t threads, const float *x, int64_t k) {
    const int64_t strips = strips_of(p.n), share = strips / (4 * threads);
    const int64_t group = share < 1 ? 1 : least(share, GROUP);
    float *gathered = NULL;
    if (p.rows > 1 || (p.rows == 1 && k % BLOCK)) {
        gathered = malloc(p.rows * p.blocks * BLOCK * sizeof(float));
        if (!gathered) return -1;
    }
    p.x = gathered ? gathered : x;
#pragma omp parallel num_threads(threads)
    {
        if (gathered) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < p.rows; row++) gather_row(x, row, p.rows, k, gathered);
        }
        _Alignas(64) float sums[GROUP * CHUNK * STRIP];
#pragma omp for schedule(static) nowait
        for (int64_t s = 0; s < strips; s += group) multiply_strips(&p, s, least(s + group, strips), sums);
    }
    free(gathered);
    return 0;
}

/* x: [rows, k], k a multiple of 64. packed: n rows. bias: [n] or NULL. y: [rows, n], written. */
EXPORT int32_t loraplex_nf4_linear(int32_t isa, int32_t threads, const float *x, const uint8_t *packed, const float *bias,
                                   float *y, int64_t rows, int64_t n, int64_t k) {
    return multiply((product){nf4_strips[isa], NF4_BYTES, packed, NULL, bias, y, rows, n, blocks_of(k)}, threads, x, k);
}

/* The same for plain weights and any k. */
EXPORT int32_t loraplex_bf16_linear(int32_t isa, int32_t threads, const float *x, const uint8_t *packed, const float *bias,
                                    float *y, int64_t rows, int64_t n, int64_t k) {
    return multiply((product){bf16_strips[isa], BF16_BYTES, packed, NULL, bias, y, rows, n, blocks_of(k)}, threads, x, k);
}

EXPORT int32_t loraplex_f32_linear(int32_t isa, int32_t threads, const float *x, const uint8_t *packed, const float *bias,
                                   float *y, int64_t rows, int64_t n, int64_t k) {
    return multiply((product){f32_strips[isa], F32_BYTES, packed, NULL, bias, y, rows, n, blocks_of(k)}, threads, x, k);
}
