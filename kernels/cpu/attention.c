/* Causal attention over the paged cache, and the writing of new keys and values into it.
 *
 * A span is the rows of one sequence, the last of the kv_length positions that its blocks hold. A unit is some of a
 * span's queries in the heads that share a head of keys, or, where rows are few, several heads of keys, which lie side
 * by side in memory: no other unit writes its output. It goes over the keys in tiles at fixed multiples of TILE from the
 * text's start and keeps a running maximum, total and weighted sum per row (Dao et al. 2022). A tile is copied side by
 * side first, converted to floats: so scattered blocks, bfloat16 and odd widths are one path, and a tile is fetched once
 * for all rows. Its keys are transposed on the way, number by number of all keys: so a vector holds the scores of one row
 * with many keys, and nothing is summed over lanes.
 *
 * The order of a row's sums is fixed by its own place in the text, however many rows they are made with: keys that it does
 * not see have a weight of exactly zero. So its bits are the same in any chunk, beside any neighbour and on any number of
 * threads.
 */
#include "cpu.h"
#include "functions.h"
#include "share.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#define TILE 64          /* keys that are summed together; a multiple of any vector */
#define UNIT_ROWS 128    /* queries times heads of one unit, unless a single query has more */
#define HEADS_TOGETHER 8 /* heads of keys of one unit at most */
#define WIDEST 16        /* lanes of any vector */
#define LINE 64          /* bytes that memory is read by */
#define TOGETHER 6       /* rows that are computed together */
#define FAR_BELOW (-1e30f) /* a running maximum to start from: finite, so that e^(it - anything) is zero */

/* All numbers of rows together, and of vectors that they are taken with: LOW and TALL are each ONE, TWO or FOUR. */
#define HEIGHTS(DO) DO(LOW, 1) DO(LOW, 2) DO(LOW, 3) DO(TALL, 4) DO(TALL, 5) DO(TALL, 6)
#define ONE(DO, ROWS) DO(ROWS, 1)
#define TWO(DO, ROWS) DO(ROWS, 1) DO(ROWS, 2)
#define FOUR(DO, ROWS) DO(ROWS, 1) DO(ROWS, 2) DO(ROWS, 3) DO(ROWS, 4)

typedef struct {
    int64_t start, end, kv_length;
    const int32_t *blocks;
} Span;

typedef struct {
    const float *q; /* [rows, heads, k_width] by its strides */
    float *out;     /* [rows, heads, v_width] */
    const void *k_cache, *v_cache; /* [positions, kv_heads, k_width or v_width] */
    int64_t q_row_stride, q_head_stride, heads, kv_heads, k_width, v_width, k_padded, v_padded, bf16, block_size;
    int64_t heads_together; /* at most HEADS_TOGETHER, and so few that every thread has a unit */
    int64_t window; /* 0: none */
    float scale, softcap; /* 0: none */
    const float *sinks;   /* [heads], or NULL */
} Attention;

/* Some keys of a span that are taken together, as rows of the cache seen as [positions * kv_heads, width]. */
typedef struct {
    int64_t keys;
    int64_t rows[TILE];
} Tile;

static const float COUNTED[WIDEST] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* One query in one head. */
typedef struct {
    int64_t place; /* among the keys of its span */
    float highest; /* score so far */
    float *out;
} Row;

/* One thread's work space. */
typedef struct {
    Tile tile;
    Row *rows;
    float *q;              /* [rows, k_width], times the scale */
    float *keys, *values;  /* of a tile: [heads, k_padded, TILE], [heads, TILE, v_padded] */
    float *scores;         /* of some rows with the tile, then their weights: [TOGETHER, TILE] */
    float *summed, *total; /* [rows, v_padded], [rows, lanes] */
} Work;

typedef void (*add_fn)(
    float *to, int64_t to_stride, const float *kept, const float *factors, int64_t factors_stride, const float *from,
    int64_t from_stride, int64_t count
);
typedef void (*attend_fn)(
    const Attention *, Work *, const Span *, int64_t head, int64_t heads, int64_t first, int64_t last
);

/* The keys of a tile from `first` on, as far as the span has any; in the place of later ones, the last. */
static Tile tile_at(const Attention *all, const Span *span, int64_t head, int64_t first) {
    Tile tile;
    tile.keys = most(0, least(TILE, span->kv_length - first));
    int64_t block = first / all->block_size, at = first % all->block_size;
    for (int64_t key = 0; key < tile.keys; key++) {
        tile.rows[key] = (span->blocks[block] * all->block_size + at) * all->kv_heads + head;
        if (++at == all->block_size) block++, at = 0;
    }
    for (int64_t key = tile.keys; key < TILE; key++) tile.rows[key] = tile.keys ? tile.rows[tile.keys - 1] : 0;
    return tile;
}

#define ISA ISA_PORTABLE
#include "vector.h"
#include "vector_math.h"
#include "attention_body.h"
#include "vector_end.h"
#if defined(__x86_64__)
#define ISA ISA_AVX2
#include "vector.h"
#include "vector_math.h"
#include "attention_body.h"
#include "vector_end.h"
#define ISA ISA_AVX512
#include "vector.h"
#include "vector_math.h"
#include "attention_body.h"
#include "vector_end.h"
#endif

static const attend_fn attends[] = ISA_TABLE(attend);

static int64_t padded(int64_t width) { return (width + WIDEST - 1) / WIDEST * WIDEST; }

static int64_t work_floats(const Attention *all, int64_t rows) {
    const int64_t tiles = all->heads_together * TILE * (all->k_padded + all->v_padded) + TOGETHER * TILE;
    const int64_t per_row = all->v_padded + WIDEST + (int64_t)sizeof(Row) / 4 + all->k_width;
    return padded(tiles + rows * per_row);
}

static Work work_at(const Attention *all, float *memory, int64_t rows) {
    Work work;
    work.keys = memory;
    work.values = work.keys + all->heads_together * TILE * all->k_padded;
    work.scores = work.values + all->heads_together * TILE * all->v_padded;
    work.summed = work.scores + TOGETHER * TILE;
    work.total = work.summed + rows * all->v_padded;
    work.rows = (Row *)(work.total + rows * WIDEST);
    work.q = (float *)(work.rows + rows);
    return work;
}

/* Run the units of a share; returns the cost of all. Without `run` they are only counted. */
static int64_t attend_all(
    const Attention *all, Work *work, const Span *spans, int64_t count, Share share, attend_fn run
) {
    const int64_t group = all->heads / all->kv_heads, together = most(1, UNIT_ROWS / group);
    const int64_t numbers = all->k_width + all->v_width, bytes = numbers * (all->bf16 ? 2 : 4);
    for (const Span *span = spans; span < spans + count; span++) {
        const int64_t queries = span->end - span->start, place = span->kv_length - queries;
        const int64_t fit = UNIT_ROWS / (least(together, queries) * group);
        const int64_t wide = most(1, least(fit, all->heads_together));
        for (int64_t head = 0; head < all->kv_heads; head += wide)
            for (int64_t first = 0; first < queries; first += together) {
                const int64_t last = least(first + together, queries), until = place + last;
                const int64_t from = all->window ? most(0, place + first - all->window + 1) : 0;
                const int64_t heads = least(wide, all->kv_heads - head);
                const int64_t of_key = COST(bytes, (numbers + 40) * (last - first) * group) * heads;
                const int64_t cost = (until - from + TILE) * of_key;
                if (takes(&share, cost) && run) run(all, work, span, head, heads, first, last);
            }
    }
    return share.passed;
}

/* `spans` holds start, end, kv_length and the place of its first block in `blocks`, of each span. Rows of no span are
 * not written. */
EXPORT int32_t loraplex_attention(
    int32_t isa, int32_t threads, float *out, const float *q, int64_t q_row_stride, int64_t q_head_stride,
    const void *k_cache, const void *v_cache, int64_t bf16, int64_t heads, int64_t kv_heads, int64_t k_width,
    int64_t v_width, int64_t block_size, const int64_t *spans, int64_t count, const int32_t *blocks, float scale,
    int64_t window, float softcap, const float *sinks
) {
    const Attention all = {
        q, out, k_cache, v_cache, q_row_stride, q_head_stride, heads, kv_heads, k_width, v_width, padded(k_width),
        padded(v_width), bf16, block_size, most(1, least(HEADS_TOGETHER, count * kv_heads / threads)), window, scale,
        softcap, sinks,
    };
    const int64_t rows = most(UNIT_ROWS, heads / kv_heads), each = work_floats(&all, rows);
    Span *read = malloc((size_t)count * sizeof(Span) + 1);
    float *memory = aligned_alloc(64, (size_t)(threads * each) * sizeof(float));
    if (!read || !memory) {
        free(read);
        free(memory);
        return -1;
    }
    for (int64_t i = 0; i < count; i++)
        read[i] = (Span){spans[4 * i], spans[4 * i + 1], spans[4 * i + 2], blocks + spans[4 * i + 3]};
    const int64_t whole = attend_all(&all, NULL, read, count, share_of(0, 0, 1), NULL);
    const attend_fn run = attends[isa];
#pragma omp parallel num_threads(worth(whole, threads))
    {
        const int64_t thread = omp_get_thread_num();
        Work work = work_at(&all, memory + thread * each, rows);
        attend_all(&all, &work, read, count, share_of(whole, thread, omp_get_num_threads()), run);
    }
    free(read);
    free(memory);
    return 0;
}

/* `cache[kv_index[row]] = rows[row]`, rounded to the cache's numbers. */
static void write_rows(
    void *cache, const float *from, int64_t row_stride, int64_t head_stride, const int64_t *kv_index, int64_t rows,
    int64_t heads, int64_t width, int64_t bf16
) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            const float *numbers = from + row * row_stride + head * head_stride;
            const int64_t at = (kv_index[row] * heads + head) * width;
            if (!bf16) {
                memcpy((float *)cache + at, numbers, (size_t)width * sizeof(float));
                continue;
            }
            for (int64_t i = 0; i < width; i++) ((uint16_t *)cache)[at + i] = to_bf16(numbers[i]);
        }
}

EXPORT int32_t loraplex_write_kv(
    int32_t isa, int32_t threads, void *k_cache, void *v_cache, const float *k, int64_t k_row_stride,
    int64_t k_head_stride, const float *v, int64_t v_row_stride, int64_t v_head_stride, const int64_t *kv_index,
    int64_t rows, int64_t kv_heads, int64_t k_width, int64_t v_width, int64_t bf16
) {
    (void)isa;
    const int64_t cost = rows * kv_heads * (k_width + v_width) * 4;
#pragma omp parallel for num_threads(worth(cost, threads)) schedule(static)
    for (int64_t first = 0; first < rows; first += UNIT_ROWS) {
        const int64_t some = least(UNIT_ROWS, rows - first);
        write_rows(k_cache, k + first * k_row_stride, k_row_stride, k_head_stride, kv_index + first, some, kv_heads,
                   k_width, bf16);
        write_rows(v_cache, v + first * v_row_stride, v_row_stride, v_head_stride, kv_index + first, some, kv_heads,
                   v_width, bf16);
    }
    return 0;
}
