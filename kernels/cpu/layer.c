/* Decoder layers in one call: y = x + attention(norm(x)), then y += mlp(norm(y)), of each in turn.
 *
 * Every step of it is a function of its own that Python can call too, in the same order and with the same bits. What one
 * call spares is Python between them: a layer's weights pass through the caches and leave nothing of the interpreter
 * there, so that each of its operations starts from memory.
 */
#include "functions.h"
#include "layer.h"
#include "share.h"

#include <string.h>

static linear_fn *const PRODUCTS[] = {
    loraplex_nf4_linear, loraplex_int8_linear, loraplex_bf16_linear, loraplex_f32_linear,
    loraplex_bf16_dot_linear,
};

static int32_t product(
    int32_t isa, int32_t threads, const Site *site, const Segments *segments, const float *x, float *y, int64_t rows
) {
    if (PRODUCTS[site->kind](isa, threads, x, site->packed, site->bias, y, rows, site->out, site->in)) return -1;
    if (!site->a || !segments->count) return 0;
    return loraplex_add_deltas(isa, threads, y, x, site->a, site->b, site->scale, site->bf16, site->in, site->out,
                               site->members, site->widths, segments->segments, segments->count, segments->page_ids,
                               segments->weights);
}

/* `y = x + z`; y may be x. */
static void add(int32_t threads, float *y, const float *x, const float *z, int64_t count) {
#pragma omp parallel for simd num_threads(worth(count * 3, threads)) schedule(static)
    for (int64_t i = 0; i < count; i++) y[i] = x[i] + z[i];
}

/* Rows of norm(x), in s->normed, to rows of attention, in s->attended. */
static int32_t attend(int32_t isa, int32_t threads, const Layer *l, const Step *s) {
    const int64_t turning = l->heads + l->kv_heads, width = l->width;
    const int64_t in_row = (turning + l->kv_heads) * width, turned_row = turning * width;
    if (product(isa, threads, &l->qkv, &s->segments[0], s->normed, s->heads, s->rows)) return -1;
    loraplex_rotate(isa, threads, s->turned, s->heads, in_row, width, s->cos, s->sin, s->rows, turning, width);
    loraplex_write_kv(isa, threads, l->k_cache, l->v_cache, s->turned + l->heads * width, turned_row, width,
                      s->heads + turned_row, in_row, width, s->kv_index, s->attending, l->kv_heads, width, width,
                      l->cache_bf16);
    const int64_t out_row = l->heads * width;
    memset(s->attended + s->attending * out_row, 0, (size_t)((s->rows - s->attending) * out_row) * sizeof(float));
    return loraplex_attention(isa, threads, s->attended, s->turned, turned_row, width, l->k_cache, l->v_cache,
                              l->cache_bf16, l->heads, l->kv_heads, width, width, l->block_size, s->spans,
                              s->span_count, s->blocks, l->scale, l->window, 0, NULL);
}

/* y may be x. */
static int32_t run(int32_t isa, int32_t threads, const Layer *l, const Step *s, const float *x, float *y) {
    const int64_t rows = s->rows, hidden = l->qkv.in, inner = l->down.in;
    loraplex_rms_norm(isa, threads, s->normed, x, l->attention_norm, rows, hidden, l->attention_epsilon);
    if (attend(isa, threads, l, s)) return -1;
    if (product(isa, threads, &l->out, &s->segments[1], s->attended, s->added, rows)) return -1;
    add(threads, y, x, s->added, rows * hidden);
    loraplex_rms_norm(isa, threads, s->normed, y, l->mlp_norm, rows, hidden, l->mlp_epsilon);
    if (product(isa, threads, &l->gate_up, &s->segments[2], s->normed, s->both, rows)) return -1;
    loraplex_gate(isa, threads, s->inner, s->both, 2 * inner, s->both + inner, 2 * inner, rows, inner, l->activation);
    if (product(isa, threads, &l->down, &s->segments[3], s->inner, s->added, rows)) return -1;
    add(threads, y, y, s->added, rows * hidden);
    return 0;
}

/* count: 1 or more. */
EXPORT int32_t loraplex_layers(
    int32_t isa, int32_t threads, const Layer *const *layers, int64_t count, const Step *s, const float *x, float *y
) {
    for (int64_t i = 0; i < count; i++)
        if (run(isa, threads, layers[i], s, i ? y : x, y)) return -1;
    return 0;
}
