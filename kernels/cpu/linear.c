/* y = x @ W.T + bias, for weights packed as packed.h says: exact in float for NF4 codes, bfloat16 and floats; or, where the
 * processor has a dot product for them, NF4 codes in 8-bit integers and bfloat16 by rows rounded to bfloat16. */
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "functions.h"
#include "packed.h"
#include "share.h"

#define AHEAD 2304 /* bytes: weights are asked for this long before they are read, about a memory access's time */

/* Ask for what is read AHEAD bytes after this, into the first cache. Past the last weights it is asked for in vain, which
 * costs nothing. */
static inline void ask_ahead(const void *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + AHEAD + at, 0, 3);
}

static const float ONES[STRIP] = {[0 ... STRIP - 1] = 1};

/* One row's values in one block, rounded: x = scale * 127 * values, start = -128 * their sum. */
typedef struct {
    union {
        int8_t values[BLOCK];
        int32_t dwords[BLOCK / 4];
    };
    float scale;
    int32_t start;
} int8_row;

#define LEAST_SCALE 1e-30f /* a block of x below it is zero: 127 over its largest may be more than a float holds */

/* round(127 * NF4_VALUES) + 128. */
static const uint8_t INT8_VALUES[16] = {1, 40, 61, 78, 92, 105, 116, 128, 138, 148, 159, 171, 184, 199, 220, 255};

#define ISA ISA_PORTABLE
#include "vector.h"
#include "vector_math.h"
#include "tile_body.h"
#include "nf4_body.h"
#include "dense_body.h"
#include "bf16_dot_body.h"
#include "int8_body.h"
#include "vector_end.h"
#if defined(__x86_64__)
#define ISA ISA_AVX2
#include "vector.h"
#include "vector_math.h"
#include "tile_body.h"
#include "nf4_body.h"
#include "dense_body.h"
#include "bf16_dot_body.h"
#include "int8_body.h"
#include "vector_end.h"
#define ISA ISA_AVX512
#include "vector.h"
#include "vector_math.h"
#include "tile_body.h"
#include "nf4_body.h"
#include "dense_body.h"
#include "bf16_dot_body.h"
#include "int8_body.h"
#include "vector_end.h"
#endif

#define CHUNK 128        /* rows whose sums a thread keeps at hand */
#define GROUP 4          /* strips that a thread takes together, so that x is read once for all of them */
#define NEAR (256 << 10) /* bytes of x that a group of strips reads at a time: half of a level 2 cache */

typedef void (*strip_fn)(const void *x, int64_t all_rows, int64_t rows, const uint8_t *strip, int64_t blocks, float *y);
static const strip_fn nf4_strips[] = ISA_TABLE(nf4_strip);
typedef void (*pair_fn)(const float *x, const uint8_t *strip, int64_t apart, int64_t blocks, float *y, int64_t y_apart);
#if defined(__x86_64__)
static const pair_fn nf4_pairs[] = {NULL, NULL, nf4_pair_avx512};
#else
static const pair_fn nf4_pairs[] = {NULL, NULL, NULL};
#endif
static const strip_fn bf16_strips[] = ISA_TABLE(bf16_strip);
static const strip_fn f32_strips[] = ISA_TABLE(f32_strip);
static const strip_fn bf16_dot_strips[] = ISA_TABLE(bf16_dot_strip); /* the widest needs AVX512_BF16: see loraplex_has_bf16_dot */
static const strip_fn int8_strips[] = ISA_TABLE(int8_strip); /* the wide ones need VNNI: see loraplex_has_int8 */

static int64_t strips_of(int64_t n) { return (n + STRIP - 1) / STRIP; }
static int64_t blocks_of(int64_t k) { return (k + BLOCK - 1) / BLOCK; }

static void pack_pairs(const uint8_t *from, int64_t r, uint8_t *to) {
    to += r / HALF * (HALF * BLOCK / 2) + PLACE(r % HALF);
    for (int j = 0; j < BLOCK / 2; j++) to[j * HALF] = from[j];
}

static void pack_dwords(const uint8_t *from, int64_t r, uint8_t *to) {
    for (int g = 0; g < BLOCK / 8; g++)
        for (int i = 0; i < 4; i++) {
            const uint8_t first = from[4 * g + i / 2], fifth = from[4 * g + 2 + i / 2];
            to[(g * STRIP + r) * 4 + i] = i % 2 ? (first & 15) | (fifth & 15) << 4 : first >> 4 | (fifth & 0xf0);
        }
}

typedef void (*pack_fn)(const uint8_t *from, int64_t r, uint8_t *to);

static void pack_codes(int32_t threads, pack_fn pack, const uint8_t *codes, const float *absmax, uint8_t *packed, int64_t n,
                       int64_t k) {
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
                pack(codes + at * (BLOCK / 2), r, to);
            }
        }
}

/* codes: [n, k / 2] and absmax: [n, k / 64] as bitsandbytes has them; k a multiple of 64. packed: [strips, blocks, NF4_BYTES]. */
EXPORT int32_t loraplex_pack_nf4(int32_t isa, int32_t threads, const uint8_t *codes, const float *absmax, uint8_t *packed,
                                 int64_t n, int64_t k) {
    pack_codes(threads, isa == ISA_AVX512 ? pack_dwords : pack_pairs, codes, absmax, packed, n, k);
    return 0;
}

EXPORT int32_t loraplex_pack_int8(int32_t isa, int32_t threads, const uint8_t *codes, const float *absmax, uint8_t *packed,
                                  int64_t n, int64_t k) {
    (void)isa;
    pack_codes(threads, pack_dwords, codes, absmax, packed, n, k);
    return 0;
}

/* [n, k] to [strips, blocks, BLOCK * STRIP], for elements of one size, a block's where AT(column, row) says; zeros past
 * the matrix. */
#define PACK_PLAIN(weight, packed, n, k, threads, AT) \
    _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t s = 0; s < strips_of(n); s++) \
        for (int64_t b = 0; b < blocks_of(k); b++) \
            for (int64_t r = 0; r < STRIP; r++) \
                for (int64_t i = 0; i < BLOCK; i++) { \
                    const int64_t row = s * STRIP + r, column = b * BLOCK + i; \
                    packed[(s * blocks_of(k) + b) * (BLOCK * STRIP) + AT(i, r)] = \
                        row < n && column < k ? weight[row * k + column] : 0; \
                }
#define BY_COLUMN(i, r) ((i) * STRIP + (r))
#define BY_PAIR(i, r) (BY_COLUMN((i) / 2, r) * 2 + (i) % 2)

/* weight: [n, k] bfloat16. packed: [strips, blocks, BF16_BYTES]. */
EXPORT int32_t loraplex_pack_bf16(int32_t isa, int32_t threads, const uint16_t *weight, uint16_t *packed, int64_t n, int64_t k) {
    (void)isa;
    PACK_PLAIN(weight, packed, n, k, threads, BY_COLUMN)
    return 0;
}

/* The same, a block in pairs of columns. */
EXPORT int32_t loraplex_pack_bf16_dot(int32_t isa, int32_t threads, const uint16_t *weight, uint16_t *packed, int64_t n,
                                      int64_t k) {
    (void)isa;
    PACK_PLAIN(weight, packed, n, k, threads, BY_PAIR)
    return 0;
}

/* weight: [n, k] float. packed: [strips, blocks, F32_BYTES]. */
EXPORT int32_t loraplex_pack_f32(int32_t isa, int32_t threads, const uint32_t *weight, uint32_t *packed, int64_t n, int64_t k) {
    (void)isa;
    PACK_PLAIN(weight, packed, n, k, threads, BY_COLUMN)
    return 0;
}

/* One row of x [rows, k] to its places in [blocks, rows], so that what a tile reads lies side by side. */
typedef void (*prepare_fn)(const float *x, int64_t row, int64_t rows, int64_t k, void *out);
static const prepare_fn round_rows[] = ISA_TABLE(round_row);

static void gather_row(const float *x, int64_t row, int64_t rows, int64_t k, void *out) {
    for (int64_t b = 0; b < blocks_of(k); b++) {
        const int64_t count = least(BLOCK, k - b * BLOCK);
        float *to = (float *)out + (b * rows + row) * BLOCK;
        memcpy(to, x + row * k + b * BLOCK, count * sizeof(float));
        memset(to + count, 0, (BLOCK - count) * sizeof(float));
    }
}

static void halve_row(const float *x, int64_t row, int64_t rows, int64_t k, void *out) {
    for (int64_t b = 0; b < blocks_of(k); b++) {
        const int64_t count = least(BLOCK, k - b * BLOCK);
        uint16_t *to = (uint16_t *)out + (b * rows + row) * BLOCK;
        for (int64_t i = 0; i < count; i++) to[i] = to_bf16(x[row * k + b * BLOCK + i]);
        memset(to + count, 0, (BLOCK - count) * sizeof *to);
    }
}

typedef struct {
    strip_fn strip;
    pair_fn pair; /* of strips, for a row alone; or NULL */
    prepare_fn prepare;
    int64_t row_bytes, block_bytes; /* of one row's values, and of one strip's weights, in one block */
} kernel;

typedef struct {
    kernel kernel;
    const uint8_t *packed;
    const uint8_t *x; /* [blocks, rows, row_bytes] */
    const float *bias;
    float *y;
    int64_t rows, n, blocks;
} product;

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

/* Rows `row` to `row + rows` in strips `from` to `to`: a few blocks of every strip in turn, so that their x stays near. */
static void add_products(const product *p, int64_t row, int64_t rows, int64_t from, int64_t to, float *sums) {
    const int64_t near = NEAR / p->kernel.row_bytes / rows, strip_bytes = p->blocks * p->kernel.block_bytes;
    if (p->rows == 1 && p->kernel.pair)
        for (; from + 2 <= to; from += 2, sums += 2 * CHUNK * STRIP)
            p->kernel.pair((const float *)p->x, p->packed + from * strip_bytes, strip_bytes, p->blocks, sums, CHUNK * STRIP);
    for (int64_t b = 0; b < p->blocks; b += near)
        for (int64_t s = from; s < to; s++)
            p->kernel.strip(p->x + (b * p->rows + row) * p->kernel.row_bytes, p->rows, rows,
                            p->packed + s * strip_bytes + b * p->kernel.block_bytes, least(near, p->blocks - b),
                            sums + (s - from) * CHUNK * STRIP);
}

/* The columns of y from strip `from` up to `to`, whose sums stay in `sums` [GROUP, CHUNK, STRIP] until they are whole. */
static void multiply_strips(const product *p, int64_t from, int64_t to, float *sums) {
    for (int64_t row = 0; row < p->rows; row += CHUNK) {
        const int64_t rows = least(CHUNK, p->rows - row);
        for (int64_t s = from; s < to; s++) start_sums(p, s, rows, sums + (s - from) * CHUNK * STRIP);
        add_products(p, row, rows, from, to, sums);
        for (int64_t s = from; s < to; s++) write_sums(p, s, row, rows, sums + (s - from) * CHUNK * STRIP);
    }
}

/* One thread's part: first its own share of the groups of strips, the same at every step, then what others have left of theirs,
 * since a core may have half of another's speed. taken: [threads], how many groups of each share. */
static void multiply_groups(const product *p, int64_t group, int64_t *taken) {
    _Alignas(64) float sums[GROUP * CHUNK * STRIP];
    const int64_t strips = strips_of(p->n), groups = (strips + group - 1) / group;
    const int64_t threads = omp_get_num_threads();
    for (int64_t i = 0; i < threads; i++) {
        const int64_t of = (omp_get_thread_num() + i) % threads, end = groups * (of + 1) / threads;
        for (int64_t at = 0; at < end;) {
#pragma omp atomic capture
            at = taken[of]++;
            at += groups * of / threads;
            if (at < end) multiply_strips(p, at * group, least((at + 1) * group, strips), sums);
        }
    }
}

/* x: [rows, k]. packed: n rows of k columns. bias: [n] or NULL. y: [rows, n], written. */
static int32_t multiply(kernel kernel, int32_t threads, const float *x, const uint8_t *packed, const float *bias, float *y,
                        int64_t rows, int64_t n, int64_t k) {
    const int64_t blocks = blocks_of(k), share = strips_of(n) / (8 * threads);
    const int64_t group = share < 1 ? 1 : least(share, GROUP);
    int64_t taken[threads];
    memset(taken, 0, sizeof taken);
    uint8_t *prepared = NULL;
    if (rows > 1 || (rows == 1 && (k % BLOCK || kernel.prepare != gather_row))) { /* one row lies as it should already */
        prepared = malloc(rows * blocks * kernel.row_bytes);
        if (!prepared) return -1;
    }
    const product p = {kernel, packed, prepared ? prepared : (const uint8_t *)x, bias, y, rows, n, blocks};
#pragma omp parallel num_threads(threads)
    {
        if (prepared) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) kernel.prepare(x, row, rows, k, prepared);
        }
        multiply_groups(&p, group, taken);
    }
    free(prepared);
    return 0;
}

#define DEFINE_LINEAR(name, pair, prepare, row_bytes, block_bytes) \
    EXPORT int32_t loraplex_##name##_linear(int32_t isa, int32_t threads, const float *x, const uint8_t *packed, \
                                            const float *bias, float *y, int64_t rows, int64_t n, int64_t k) { \
        const kernel chosen = {name##_strips[isa], pair, prepare, row_bytes, block_bytes}; \
        return multiply(chosen, threads, x, packed, bias, y, rows, n, k); \
    }
DEFINE_LINEAR(nf4, nf4_pairs[isa], gather_row, BLOCK * sizeof(float), NF4_BYTES) /* k a multiple of 64 */
DEFINE_LINEAR(int8, NULL, round_rows[isa], sizeof(int8_row), NF4_BYTES)          /* k a multiple of 64 */
DEFINE_LINEAR(bf16, NULL, gather_row, BLOCK * sizeof(float), BF16_BYTES)
DEFINE_LINEAR(bf16_dot, NULL, halve_row, BLOCK * sizeof(uint16_t), BF16_BYTES)
DEFINE_LINEAR(f32, NULL, gather_row, BLOCK * sizeof(float), F32_BYTES)

/* Whether this instruction set has a dot product of bytes here: 1, or 0. The portable one serves tests, at no speed. */
EXPORT int32_t loraplex_has_int8(int32_t isa, int32_t threads) {
    (void)threads;
#if defined(__x86_64__)
    if (isa == ISA_AVX512) return __builtin_cpu_supports("avx512vnni") != 0;
    if (isa == ISA_AVX2) {
        uint32_t a = 7, b, c = 1, d;
        __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        return a >> 4 & 1;
    }
#endif
    return isa == ISA_PORTABLE;
}

/* Whether this instruction set has a dot product of pairs of bfloat16 here: 1, or 0. The others serve tests. */
EXPORT int32_t loraplex_has_bf16_dot(int32_t isa, int32_t threads) {
    (void)threads;
#if defined(__x86_64__)
    return isa == ISA_AVX512 && __builtin_cpu_supports("avx512bf16") != 0;
#else
    return (void)isa, 0;
#endif
}
