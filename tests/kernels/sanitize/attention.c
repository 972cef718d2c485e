/* Attention over caches of exactly the blocks that its spans fill: ragged spans, windows, softcaps, sinks, grouped heads,
 * widths that fill no vector; and the writing of such caches. */
#include "cases.h"
#include "functions.h"

typedef struct {
    int64_t heads, kv_heads, k_width, v_width, block_size, window;
    float softcap;
    int sinks, bf16;
} Shape;

typedef struct {
    int64_t rows, positions;
    int64_t *spans;  /* [count, 4]: start, end, keys, first of its blocks */
    int32_t *blocks; /* the last ones of the cache first */
} Layout;

static Layout layout_of(const int64_t lengths[][2], int64_t count, int64_t block_size) {
    Layout layout = {0, 0, malloc((size_t)count * 4 * sizeof(int64_t)), NULL};
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t span[4] = {layout.rows, layout.rows + lengths[i][0], lengths[i][1], blocks};
        memcpy(layout.spans + 4 * i, span, sizeof span);
        layout.rows += lengths[i][0];
        blocks += (lengths[i][1] + block_size - 1) / block_size;
    }
    layout.positions = blocks * block_size;
    layout.blocks = malloc((size_t)blocks * sizeof(int32_t));
    for (int64_t i = 0; i < blocks; i++) layout.blocks[i] = (int32_t)(blocks - 1 - i);
    return layout;
}

/* One query in one head, in double: a softmax over the keys it sees, and a sink. */
static void expect_query(const Shape *s, const Layout *layout, const int64_t *span, int64_t row, int64_t head,
                         const float *q, const float *keys, const float *values, const float *sinks, const float *out) {
    const int64_t at = span[2] - (span[1] - span[0]) + row, of = head / (s->heads / s->kv_heads);
    const float *x = q + ((span[0] + row) * s->heads + head) * s->k_width;
    double total = sinks ? exp(sinks[head]) : 0, *sum = calloc((size_t)s->v_width, sizeof(double));
    for (int64_t key = s->window ? (at - s->window + 1 > 0 ? at - s->window + 1 : 0) : 0; key <= at; key++) {
        const int64_t block = layout->blocks[span[3] + key / s->block_size];
        const int64_t place = (block * s->block_size + key % s->block_size) * s->kv_heads + of;
        double score = 0;
        for (int64_t i = 0; i < s->k_width; i++) score += (double)x[i] * keys[place * s->k_width + i];
        if (s->softcap > 0) score = s->softcap * tanh(score / s->softcap);
        total += exp(score);
        for (int64_t i = 0; i < s->v_width; i++) sum[i] += exp(score) * values[place * s->v_width + i];
    }
    for (int64_t i = 0; i < s->v_width; i++)
        expect("attention", out[((span[0] + row) * s->heads + head) * s->v_width + i], sum[i] / total, 1e-4);
    free(sum);
}

static void attention_case(int32_t isa, const Shape *s, const int64_t lengths[][2], int64_t count) {
    const Layout layout = layout_of(lengths, count, s->block_size);
    const int64_t places = layout.positions * s->kv_heads;
    float *q = floats(layout.rows * s->heads * s->k_width), *sinks = s->sinks ? floats(s->heads) : NULL;
    float *keys = floats(places * s->k_width), *values = floats(places * s->v_width);
    float *out = malloc((size_t)(layout.rows * s->heads * s->v_width) * sizeof(float));
    cut(keys, places * s->k_width), cut(values, places * s->v_width);
    void *k_cache = stored(keys, places * s->k_width, s->bf16), *v_cache = stored(values, places * s->v_width, s->bf16);
    loraplex_attention(isa, 2, out, q, s->heads * s->k_width, s->k_width, k_cache, v_cache, s->bf16, s->heads, s->kv_heads,
                       s->k_width, s->v_width, s->block_size, layout.spans, count, layout.blocks, 1, s->window, s->softcap,
                       sinks);
    for (int64_t i = 0; i < count; i++)
        for (int64_t row = 0; row < lengths[i][0]; row++)
            for (int64_t head = 0; head < s->heads; head++)
                expect_query(s, &layout, layout.spans + 4 * i, row, head, q, keys, values, sinks, out);
    free(layout.spans), free(layout.blocks), free(q), free(sinks), free(keys), free(values), free(out), free(k_cache),
        free(v_cache);
}

/* Rows given by heads, written last place first. */
static void write_case(int32_t isa, int64_t rows, int64_t heads, int64_t k_width, int64_t v_width, int bf16) {
    const int64_t numbers[2] = {rows * heads * k_width, rows * heads * v_width}, widths[2] = {k_width, v_width};
    float *from[2] = {floats(numbers[0]), floats(numbers[1])};
    char *cache[2];
    int64_t *index = malloc((size_t)rows * sizeof(int64_t));
    for (int64_t row = 0; row < rows; row++) index[row] = rows - 1 - row;
    for (int which = 0; which < 2; which++) cut(from[which], numbers[which]), cache[which] = malloc(numbers[which] * (bf16 ? 2 : 4));
    loraplex_write_kv(isa, 2, cache[0], cache[1], from[0], k_width, rows * k_width, from[1], v_width, rows * v_width, index,
                      rows, heads, k_width, v_width, bf16);
    for (int which = 0; which < 2; which++) {
        char *want = stored(from[which], numbers[which], bf16);
        const int64_t bytes = widths[which] * (bf16 ? 2 : 4);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t head = 0; head < heads; head++)
                expect("write_kv", memcmp(cache[which] + (index[row] * heads + head) * bytes,
                                          want + (head * rows + row) * bytes, (size_t)bytes), 0, 0);
        free(want), free(from[which]), free(cache[which]);
    }
    free(index);
}

void attention(int32_t isa) {
    const Shape shapes[] = {{2, 2, 8, 12, 16, 0, 0, 0, 0}, {6, 2, 17, 5, 1, 20, 0, 0, 0},   {4, 1, 33, 31, 64, 1, 0, 1, 0},
                            {3, 3, 1, 1, 16, 0, 5, 0, 0},  {5, 1, 80, 65, 16, 70, 30, 1, 0}};
    const int64_t lengths[][2] = {{1, 1}, {1, 37}, {7, 90}, {1, 64}, {19, 19}, {3, 129}, {1, 65}};
    for (int64_t i = 0; i < COUNT(shapes); i++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            Shape shape = shapes[i];
            shape.bf16 = bf16;
            attention_case(isa, &shape, lengths, COUNT(lengths));
            attention_case(isa, &shape, lengths + 2, 1);
            write_case(isa, 1, shape.kv_heads, shape.k_width, shape.v_width, bf16);
            write_case(isa, 70, shape.kv_heads, shape.k_width, shape.v_width, bf16);
        }
}
