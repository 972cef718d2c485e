/* The functions that a layer is made of, as their sources define them and library.py declares them. */
#ifndef LORAPLEX_FUNCTIONS_H
#define LORAPLEX_FUNCTIONS_H

#include "cpu.h"

typedef int32_t linear_fn(int32_t isa, int32_t threads, const float *x, const uint8_t *packed, const float *bias, float *y,
                          int64_t rows, int64_t n, int64_t k);
EXPORT linear_fn loraplex_nf4_linear, loraplex_int8_linear, loraplex_bf16_linear, loraplex_f32_linear,
    loraplex_bf16_dot_linear;

EXPORT int32_t loraplex_add_deltas(
    int32_t isa, int32_t threads, float *y, const float *x, const void *a, const void *b, const float *scale,
    int64_t bf16, int64_t width, int64_t total, int64_t members, const int64_t *widths, const void *segments,
    int64_t count, const int32_t *page_ids, const float *weights
);

EXPORT int32_t loraplex_attention(
    int32_t isa, int32_t threads, float *out, const float *q, int64_t q_row_stride, int64_t q_head_stride,
    const void *k_cache, const void *v_cache, int64_t bf16, int64_t heads, int64_t kv_heads, int64_t k_width,
    int64_t v_width, int64_t block_size, const int64_t *spans, int64_t count, const int32_t *blocks, float scale,
    int64_t window, float softcap, const float *sinks
);

EXPORT int32_t loraplex_write_kv(
    int32_t isa, int32_t threads, void *k_cache, void *v_cache, const float *k, int64_t k_row_stride,
    int64_t k_head_stride, const float *v, int64_t v_row_stride, int64_t v_head_stride, const int64_t *kv_index,
    int64_t rows, int64_t kv_heads, int64_t k_width, int64_t v_width, int64_t bf16
);

EXPORT int32_t loraplex_rms_norm(
    int32_t isa, int32_t threads, float *y, const float *x, const float *weight, int64_t rows, int64_t width,
    float epsilon
);

EXPORT int32_t loraplex_gate(
    int32_t isa, int32_t threads, float *y, const float *gate, int64_t gate_stride, const float *up, int64_t up_stride,
    int64_t rows, int64_t width, int64_t kind
);

EXPORT int32_t loraplex_rotate(
    int32_t isa, int32_t threads, float *y, const float *x, int64_t row_stride, int64_t head_stride, const float *cos,
    const float *sin, int64_t rows, int64_t heads, int64_t width
);

#endif
