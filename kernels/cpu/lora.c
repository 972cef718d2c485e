/* The deltas of every adapter in a step, added to one site's output: y += weight * scale * (x A^T) B over paged A and B.
 *
 * A segment is a run of rows that read the same pages. Work is cut into units that no other unit writes to: in the
 * shrink (x A^T, into v) four rank rows of one page and member for up to ROWS rows, in the expand (v B, onto y) up to
 * STRIP columns of one member for up to ROWS rows. Each thread takes units side by side, about as much as any other by
 * the bytes they read and the products they make, so that many adapters of a row each and one adapter of many rows are
 * both shared evenly. A sum's order is fixed by the pages alone.
 *
 * A page whose scale for a member is zero has zeros there: it is passed over.
 *
 * Source: Chen et al. 2023 (Punica) for shrink and expand over segments; Sheng et al. 2023 (S-LoRA) for pages.
 */
#include "cpu.h"
#include "functions.h"
#include "share.h"

#include <omp.h>
#include <stdlib.h>

#define PAGE_RANK 16
#define RANKS 4   /* rank rows taken together: as many streams of memory */
#define ROWS 32   /* rows of one unit at most */
#define STRIP 512 /* columns of one unit at most: their sums stay in the first cache */
#define FEW 4 /* rows from which an expand reads weights once for several */

typedef struct {
    const float *x; /* [rows, width] */
    float *v;       /* [rows, v_stride]: RANKS of them are written in each row */
    const char *a;  /* [RANKS, width] */
    int64_t rows, width, v_stride;
    float factor;
} Shrink;

typedef struct {
    const float *v; /* [rows, v_stride]; a page's PAGE_RANK numbers every v_page_stride */
    float *y;       /* [rows, y_stride]: `width` of them are written in each row */
    const char *b;  /* the strip's first column of page 0: [PAGE_RANK, b_stride] in each page */
    const float *scale; /* of this member in page 0; page p's at p * members */
    const int32_t *page_ids;
    int64_t pages, page_stride, rows, width, v_stride, v_page_stride, y_stride, b_stride, members;
} Expand;

typedef void (*shrink_fn)(const Shrink *unit, const void *next, int64_t bf16);
typedef void (*expand_fn)(const Expand *unit, const Expand *next, int64_t bf16);

#define ISA ISA_PORTABLE
#include "vector.h"
#include "vector_math.h"
#include "lora_body.h"
#include "vector_end.h"
#if defined(__x86_64__)
#define ISA ISA_AVX2
#include "vector.h"
#include "vector_math.h"
#include "lora_body.h"
#include "vector_end.h"
#define ISA ISA_AVX512
#include "vector.h"
#include "vector_math.h"
#include "lora_body.h"
#include "vector_end.h"
#endif

static const shrink_fn shrinks[] = ISA_TABLE(shrink);
static const expand_fn expands[] = ISA_TABLE(expand);

/* A segment as Python gives it: rows start to end, and where its pages stand in the list of all. */
typedef struct {
    int32_t start, end, first, pages;
} Segment;

typedef struct {
    float *y;       /* [rows, total] */
    const float *x; /* [rows, width] */
    const char *a;  /* [pages, members, PAGE_RANK, width] */
    const char *b;  /* [pages, PAGE_RANK, total] */
    const float *scale; /* [pages, members] */
    int64_t bf16, width, total, members;
    const int64_t *widths; /* [members] */
    const Segment *segments;
    int64_t count;
    const int32_t *page_ids;
    const float *weights; /* one per page in page_ids */
    float *v;             /* [sum over segments of rows * pages, members, PAGE_RANK] */
} Site;

static int64_t shrink_cost(const Site *site, int64_t rows) {
    const int64_t numbers = RANKS * site->width;
    return COST(numbers * (site->bf16 ? 2 : 4), numbers * rows);
}

static int64_t expand_cost(const Site *site, int64_t rows, int64_t pages, int64_t width) {
    const int64_t numbers = pages * PAGE_RANK * width;
    return COST(numbers * (site->bf16 ? 2 : 4), numbers * rows);
}

/* Run the units of a share, each with the beginning of the one after it, whose weights are asked for meanwhile;
 * returns the cost of all units. Without `run` they are only counted. */
static int64_t shrink_all(const Site *site, Share share, shrink_fn run) {
    const int64_t size = site->bf16 ? 2 : 4;
    Shrink waiting = {0};
    float *v = site->v;
    for (const Segment *s = site->segments; s < site->segments + site->count; s++) {
        const int64_t v_stride = s->pages * site->members * PAGE_RANK;
        for (int64_t row = s->start; row < s->end; row += ROWS) {
            const int64_t rows = least(ROWS, s->end - row), cost = shrink_cost(site, rows);
            for (int64_t part = 0; part < s->pages * site->members; part++) {
                const int64_t page = s->first + part / site->members, member = part % site->members;
                const int64_t id = site->page_ids[page] * site->members + member;
                if (site->scale[id] == 0.0f) continue;
                for (int64_t k = 0; k < PAGE_RANK; k += RANKS) {
                    if (!takes(&share, cost) || !run) continue;
                    const Shrink unit = {
                        .x = site->x + row * site->width,
                        .v = v + part * PAGE_RANK + k,
                        .a = site->a + (id * PAGE_RANK + k) * site->width * size,
                        .rows = rows,
                        .width = site->width,
                        .v_stride = v_stride,
                        .factor = site->scale[id] * site->weights[page],
                    };
                    if (waiting.rows) run(&waiting, unit.a, site->bf16);
                    waiting = unit;
                }
            }
            v += rows * v_stride;
        }
    }
    if (waiting.rows) run(&waiting, waiting.a, site->bf16);
    return share.passed;
}

static int64_t expand_all(const Site *site, Share share, expand_fn run) {
    const int64_t size = site->bf16 ? 2 : 4;
    Expand waiting = {0};
    const float *v = site->v;
    for (const Segment *s = site->segments; s < site->segments + site->count; s++) {
        const int64_t v_stride = s->pages * site->members * PAGE_RANK;
        for (int64_t row = s->start; row < s->end; row += ROWS) {
            const int64_t rows = least(ROWS, s->end - row);
            int64_t column = 0;
            for (int64_t member = 0; member < site->members; column += site->widths[member++])
                for (int64_t at = 0; at < site->widths[member]; at += STRIP) {
                    const int64_t width = least(STRIP, site->widths[member] - at);
                    if (!takes(&share, expand_cost(site, rows, s->pages, width)) || !run) continue;
                    const Expand unit = {
                        .v = v + member * PAGE_RANK,
                        .y = site->y + row * site->total + column + at,
                        .b = site->b + (column + at) * size,
                        .scale = site->scale + member,
                        .page_ids = site->page_ids + s->first,
                        .pages = s->pages,
                        .page_stride = PAGE_RANK * site->total,
                        .rows = rows,
                        .width = width,
                        .v_stride = v_stride,
                        .v_page_stride = site->members * PAGE_RANK,
                        .y_stride = site->total,
                        .b_stride = site->total,
                        .members = site->members,
                    };
                    if (waiting.rows) run(&waiting, &unit, site->bf16);
                    waiting = unit;
                }
            v += rows * v_stride;
        }
    }
    if (waiting.rows) run(&waiting, &waiting, site->bf16);
    return share.passed;
}

EXPORT int32_t loraplex_add_deltas(
    int32_t isa, int32_t threads, float *y, const float *x, const void *a, const void *b, const float *scale,
    int64_t bf16, int64_t width, int64_t total, int64_t members, const int64_t *widths, const void *segments,
    int64_t count, const int32_t *page_ids, const float *weights
) {
    Site site = {y, x, a, b, scale, bf16, width, total, members, widths, segments, count, page_ids, weights, NULL};
    int64_t numbers = 0;
    for (const Segment *s = site.segments; s < site.segments + count; s++)
        numbers += (int64_t)(s->end - s->start) * s->pages * members * PAGE_RANK;
    site.v = malloc((size_t)(numbers ? numbers : 1) * sizeof(float));
    if (!site.v) return -1;
    const shrink_fn shrink = shrinks[isa];
    const expand_fn expand = expands[isa];
    const int64_t shrinking = shrink_all(&site, share_of(0, 0, 1), NULL);
    const int64_t expanding = expand_all(&site, share_of(0, 0, 1), NULL);
    const int64_t wanted = worth(shrinking + expanding, threads);
#pragma omp parallel num_threads(wanted)
    {
        const int64_t thread = omp_get_thread_num(), among = omp_get_num_threads();
        shrink_all(&site, share_of(shrinking, thread, among), shrink);
#pragma omp barrier
        expand_all(&site, share_of(expanding, thread, among), expand);
    }
    free(site.v);
    return 0;
}
