/* The adapters' deltas: segments of any length with rows of the base between them, blends, adapters of lower rank than
 * a page, members that an adapter leaves alone. */
#include "cases.h"
#include "functions.h"

#define RANK 16
#define PAGES 4

typedef struct {
    int32_t start, end, first, pages;
} Segment;

/* One site: factors of four pages, page p of the rank RANK - 5 p; page 2 leaves its last member alone. */
typedef struct {
    int64_t width, total, members;
    const int64_t *widths;
    float *a, *b, *scale; /* [PAGES, members, RANK, width], [PAGES, RANK, total], [PAGES, members] */
} Site;

static Site site_of(int64_t width, int64_t members, const int64_t *widths) {
    Site site = {width, 0, members, widths, NULL, NULL, NULL};
    for (int64_t member = 0; member < members; member++) site.total += widths[member];
    site.a = floats(PAGES * members * RANK * width);
    site.b = floats(PAGES * RANK * site.total);
    site.scale = floats(PAGES * members);
    cut(site.a, PAGES * members * RANK * width);
    cut(site.b, PAGES * RANK * site.total);
    for (int64_t page = 0; page < PAGES; page++)
        for (int64_t k = RANK - 5 * page; k < RANK; k++) {
            memset(site.b + (page * RANK + k) * site.total, 0, (size_t)site.total * sizeof(float));
            for (int64_t member = 0; member < members; member++)
                memset(site.a + ((page * members + member) * RANK + k) * width, 0, (size_t)width * sizeof(float));
        }
    site.scale[3 * members - 1] = 0;
    return site;
}

/* What one page adds to one number of y. */
static double page_delta(const Site *site, int64_t page, int64_t member, int64_t column, const float *x) {
    double sum = 0;
    for (int64_t k = 0; k < RANK; k++) {
        const float *a = site->a + ((page * site->members + member) * RANK + k) * site->width;
        double hidden = 0;
        for (int64_t i = 0; i < site->width; i++) hidden += (double)x[i] * a[i];
        sum += hidden * site->b[(page * RANK + k) * site->total + column];
    }
    return sum * site->scale[page * site->members + member];
}

static void expect_row(const Site *site, const float *y, const float *before, const float *x, const int32_t *page_ids,
                       const float *weights, int64_t pages) {
    int64_t column = 0;
    for (int64_t member = 0; member < site->members; member++)
        for (int64_t i = 0; i < site->widths[member]; i++, column++) {
            double want = before[column];
            for (int64_t p = 0; p < pages; p++) want += weights[p] * page_delta(site, page_ids[p], member, column, x);
            expect("deltas", y[column], want, 1e-4 * sqrt((double)site->width));
        }
}

static void deltas_case(int32_t isa, const Site *site, const Segment *given, int64_t count, int64_t all, int bf16) {
    const int32_t ids[] = {3, 0, 2, 1, 3};
    const float shares[] = {1, 0.25f, 0.75f, 1, -2};
    const int64_t numbers = all * site->total, pages = given[count - 1].first + given[count - 1].pages;
    Segment *segments = malloc((size_t)count * sizeof(Segment));
    int32_t *page_ids = malloc((size_t)pages * sizeof(int32_t));
    float *weights = malloc((size_t)pages * sizeof(float)), *x = floats(all * site->width), *before = floats(numbers);
    memcpy(segments, given, (size_t)count * sizeof(Segment));
    memcpy(page_ids, ids, (size_t)pages * sizeof(int32_t));
    memcpy(weights, shares, (size_t)pages * sizeof(float));
    void *a = stored(site->a, PAGES * site->members * RANK * site->width, bf16);
    void *b = stored(site->b, PAGES * RANK * site->total, bf16);
    float *y = stored(before, numbers, 0);
    loraplex_add_deltas(isa, 2, y, x, a, b, site->scale, bf16, site->width, site->total, site->members, site->widths,
                        segments, count, page_ids, weights);
    for (int64_t row = 0, at = 0; row < all; row++) {
        while (at < count && segments[at].end <= row) at++;
        const int adapted = at < count && segments[at].start <= row;
        expect_row(site, y + row * site->total, before + row * site->total, x + row * site->width,
                   page_ids + (adapted ? segments[at].first : 0), weights + (adapted ? segments[at].first : 0),
                   adapted ? segments[at].pages : 0);
    }
    free(segments), free(page_ids), free(weights), free(x), free(before), free(a), free(b), free(y);
}

void deltas(int32_t isa) {
    const int64_t insides[] = {1, 16, 37, 129}, widths[] = {17, 5, 33}, wide[] = {1100, 513};
    const Segment one[] = {{0, 1, 0, 1}}, many[] = {{0, 1, 0, 1}, {3, 8, 1, 2}, {8, 47, 3, 1}, {48, 50, 4, 1}};
    for (int bf16 = 0; bf16 < 2; bf16++) {
        for (int64_t i = 0; i < COUNT(insides); i++)
            for (int64_t members = 1; members <= COUNT(widths); members++) {
                Site site = site_of(insides[i], members, widths);
                deltas_case(isa, &site, one, COUNT(one), 1, bf16);
                deltas_case(isa, &site, many, COUNT(many), 51, bf16);
                free(site.a), free(site.b), free(site.scale);
            }
        Site site = site_of(65, COUNT(wide), wide);
        deltas_case(isa, &site, many, COUNT(many), 50, bf16);
        free(site.a), free(site.b), free(site.scale);
    }
}
