/* Whole layers in one call, over room of exactly their size: the bits of their steps called one by one. Rows that only pad
 * are in no span, and one site has adapters. */
#include "layer.h"
#include "cases.h"
#include "functions.h"
#include "packed.h"

enum { HIDDEN = 24, HEADS = 3, KV_HEADS = 1, WIDTH = 8, INNER = 20, BLOCK_SIZE = 4, PAGES = 2, RANK = 16, F32 = 3 };
enum { TURNED = (HEADS + KV_HEADS) * WIDTH, IN_ROW = TURNED + KV_HEADS * WIDTH, OUT_ROW = HEADS * WIDTH };

int32_t loraplex_layers(int32_t, int32_t, const Layer *const *, int64_t count, const Step *, const float *x, float *y);
int32_t loraplex_pack_f32(int32_t, int32_t, const uint32_t *, uint32_t *, int64_t n, int64_t k);

static float *room(int64_t count) { return malloc((size_t)count * sizeof(float)); }

static Site site_of(int32_t isa, int64_t out, int64_t in) {
    float *w = floats(out * in);
    uint8_t *packed = malloc((size_t)((out + STRIP - 1) / STRIP * ((in + BLOCK - 1) / BLOCK) * F32_BYTES));
    loraplex_pack_f32(isa, 2, (const uint32_t *)w, (uint32_t *)packed, out, in);
    free(w);
    return (Site){.packed = packed, .kind = F32, .in = in, .out = out};
}

static void step_by_step(int32_t isa, const Layer *l, const Step *s, const float *x, float *y) {
    const int64_t rows = s->rows;
    float *qkv = room(rows * IN_ROW), *turned = room(rows * TURNED), *attended = calloc((size_t)(rows * OUT_ROW), 4);
    float *normed = room(rows * HIDDEN), *added = room(rows * HIDDEN), *both = room(rows * 2 * INNER);
    float *inner = room(rows * INNER);
    loraplex_rms_norm(isa, 2, normed, x, l->attention_norm, rows, HIDDEN, l->attention_epsilon);
    loraplex_f32_linear(isa, 2, normed, l->qkv.packed, l->qkv.bias, qkv, rows, IN_ROW, HIDDEN);
    loraplex_add_deltas(isa, 2, qkv, normed, l->qkv.a, l->qkv.b, l->qkv.scale, 0, HIDDEN, IN_ROW, l->qkv.members,
                        l->qkv.widths, s->segments[0].segments, 1, s->segments[0].page_ids, s->segments[0].weights);
    loraplex_rotate(isa, 2, turned, qkv, IN_ROW, WIDTH, s->cos, s->sin, rows, HEADS + KV_HEADS, WIDTH);
    loraplex_write_kv(isa, 2, l->k_cache, l->v_cache, turned + OUT_ROW, TURNED, WIDTH, qkv + TURNED, IN_ROW, WIDTH,
                      s->kv_index, s->attending, KV_HEADS, WIDTH, WIDTH, 0);
    loraplex_attention(isa, 2, attended, turned, TURNED, WIDTH, l->k_cache, l->v_cache, 0, HEADS, KV_HEADS, WIDTH, WIDTH,
                       BLOCK_SIZE, s->spans, s->span_count, s->blocks, l->scale, 0, 0, NULL);
    loraplex_f32_linear(isa, 2, attended, l->out.packed, NULL, added, rows, HIDDEN, OUT_ROW);
    for (int64_t i = 0; i < rows * HIDDEN; i++) y[i] = x[i] + added[i];
    loraplex_rms_norm(isa, 2, normed, y, l->mlp_norm, rows, HIDDEN, l->mlp_epsilon);
    loraplex_f32_linear(isa, 2, normed, l->gate_up.packed, NULL, both, rows, 2 * INNER, HIDDEN);
    loraplex_gate(isa, 2, inner, both, 2 * INNER, both + INNER, 2 * INNER, rows, INNER, l->activation);
    loraplex_f32_linear(isa, 2, inner, l->down.packed, NULL, added, rows, HIDDEN, INNER);
    for (int64_t i = 0; i < rows * HIDDEN; i++) y[i] += added[i];
    free(qkv), free(turned), free(attended), free(normed), free(added), free(both), free(inner);
}

void layer(int32_t isa) {
    enum { ROWS = 6, ATTENDING = 5, KEYS = 7, POSITIONS = 12 };
    const int64_t widths[] = {OUT_ROW, WIDTH, WIDTH}, kv_index[ROWS] = {0, 8, 9, 10, 4, 0};
    const int64_t spans[] = {0, 1, 1, 0, 1, ATTENDING, KEYS, 1};
    const int32_t blocks[] = {0, 2, 1}, segment[] = {1, ATTENDING, 0, PAGES}, page_ids[] = {1, 0};
    const float weights[] = {1, 0.5f};
    float *a = floats(PAGES * 3 * RANK * HIDDEN), *b = floats(PAGES * RANK * IN_ROW), *scale = floats(PAGES * 3);
    float *bias = floats(IN_ROW), *norms = floats(2 * HIDDEN), *cos = floats(ROWS * WIDTH), *sin = floats(ROWS * WIDTH);
    float *keys = floats(POSITIONS * WIDTH), *values = floats(POSITIONS * WIDTH), *x = floats(ROWS * HIDDEN);
    float *got = room(ROWS * HIDDEN), *want = room(ROWS * HIDDEN);
    Layer l = {
        .qkv = site_of(isa, IN_ROW, HIDDEN), .out = site_of(isa, HIDDEN, OUT_ROW),
        .gate_up = site_of(isa, 2 * INNER, HIDDEN), .down = site_of(isa, HIDDEN, INNER),
        .attention_norm = norms, .mlp_norm = norms + HIDDEN, .k_cache = keys, .v_cache = values,
        .block_size = BLOCK_SIZE, .heads = HEADS, .kv_heads = KV_HEADS, .width = WIDTH,
        .attention_epsilon = 1e-5f, .mlp_epsilon = 1e-6f, .scale = 0.35f,
    };
    l.qkv.a = a, l.qkv.b = b, l.qkv.scale = scale, l.qkv.bias = bias, l.qkv.members = 3, l.qkv.widths = widths;
    Step s = {
        .rows = ROWS, .attending = ATTENDING, .cos = cos, .sin = sin, .kv_index = kv_index, .spans = spans,
        .span_count = 2, .blocks = blocks, .segments = {{segment, 1, page_ids, weights}},
        .normed = room(ROWS * HIDDEN), .heads = room(ROWS * IN_ROW), .turned = room(ROWS * TURNED),
        .attended = room(ROWS * OUT_ROW), .added = room(ROWS * HIDDEN), .both = room(ROWS * 2 * INNER),
        .inner = room(ROWS * INNER),
    };
    const Layer *const twice[] = {&l, &l};
    expect("a layer's word", loraplex_layers(isa, 2, twice, 1, &s, x, got), 0, 0);
    step_by_step(isa, &l, &s, x, want);
    for (int64_t i = 0; i < ROWS * HIDDEN; i++) expect("a layer", got[i], want[i], 0);
    expect("two layers' word", loraplex_layers(isa, 2, twice, 2, &s, x, got), 0, 0);
    step_by_step(isa, &l, &s, want, x);
    for (int64_t i = 0; i < ROWS * HIDDEN; i++) expect("two layers", got[i], x[i], 0);
    free(a), free(b), free(scale), free(bias), free(norms), free(cos), free(sin), free(keys), free(values), free(x);
    free(got), free(want), free((void *)l.qkv.packed), free((void *)l.out.packed), free((void *)l.gate_up.packed);
    free((void *)l.down.packed), free(s.normed), free(s.heads), free(s.turned), free(s.attended), free(s.added);
    free(s.both), free(s.inner);
}
