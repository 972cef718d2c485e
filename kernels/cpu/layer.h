/* What a decoder layer is called with. layer.py has the same fields in the same order. */
#ifndef LORAPLEX_LAYER_H
#define LORAPLEX_LAYER_H

#include <stdint.h>

/* Sibling linears that read one input, and the pages of their adapters. */
typedef struct {
    const uint8_t *packed;
    const float *bias; /* or NULL */
    int64_t kind, in, out; /* kind: place in PRODUCTS */
    const void *a, *b;     /* NULL: no adapters */
    const float *scale;
    int64_t bf16, members;
    const int64_t *widths;
} Site;

typedef struct {
    Site qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm;
    void *k_cache, *v_cache;
    int64_t cache_bf16, block_size, heads, kv_heads, width, window, activation;
    float attention_epsilon, mlp_epsilon, scale;
} Layer;

typedef struct {
    const void *segments;
    int64_t count;
    const int32_t *page_ids;
    const float *weights;
} Segments;

typedef struct {
    int64_t rows, attending; /* the first `attending` rows are in spans; the others pad the step */
    const float *cos, *sin; /* [rows, width] */
    const int64_t *kv_index, *spans;
    int64_t span_count;
    const int32_t *blocks;
    Segments segments[4]; /* of the sites, in their order */
    float *normed, *heads, *turned, *attended, *added, *both, *inner; /* [rows, what a row of each has] */
} Step;

#endif
