/* What happens to a row between two products: the norm, the gate of an MLP, the turning of queries and keys. */
#include "cpu.h"
#include "functions.h"
#include "share.h"

#include <math.h>

#define SILU 0
#define GELU_TANH 1
#define PIECE 2048 /* numbers of a row that one thread takes */

typedef void (*norm_fn)(float *y, const float *x, const float *weight, int64_t width, float epsilon);
typedef void (*gate_fn)(float *y, const float *gate, const float *up, int64_t count, int64_t kind);
typedef void (*turn_fn)(float *y, const float *x, const float *cos, const float *sin, int64_t half);

#define ISA ISA_PORTABLE
#include "vector.h"
#include "vector_math.h"
#include "rows_body.h"
#include "vector_end.h"
#if defined(__x86_64__)
#define ISA ISA_AVX2
#include "vector.h"
#include "vector_math.h"
#include "rows_body.h"
#include "vector_end.h"
#define ISA ISA_AVX512
#include "vector.h"
#include "vector_math.h"
#include "rows_body.h"
#include "vector_end.h"
#endif

static const norm_fn norms[] = ISA_TABLE(norm_row);
static const gate_fn gates[] = ISA_TABLE(gate_row);
static const turn_fn turns[] = ISA_TABLE(turn_head);

/* `y[row] = weight * x[row] / sqrt(mean(x[row]^2) + epsilon)`, rows of `width`. */
EXPORT int32_t loraplex_rms_norm(
    int32_t isa, int32_t threads, float *y, const float *x, const float *weight, int64_t rows, int64_t width,
    float epsilon
) {
    const norm_fn norm = norms[isa];
#pragma omp parallel for num_threads(worth(rows * width * 3, threads)) schedule(static)
    for (int64_t row = 0; row < rows; row++) norm(y + row * width, x + row * width, weight, width, epsilon);
    return 0;
}

/* `y[row] = activation(gate[row]) * up[row]`, or without the factor where `up` is NULL. */
EXPORT int32_t loraplex_gate(
    int32_t isa, int32_t threads, float *y, const float *gate, int64_t gate_stride, const float *up, int64_t up_stride,
    int64_t rows, int64_t width, int64_t kind
) {
    const gate_fn run = gates[isa];
    const int64_t pieces = (width + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(worth(rows * width * 15, threads)) schedule(static)
    for (int64_t piece = 0; piece < rows * pieces; piece++) {
        const int64_t row = piece / pieces, first = piece % pieces * PIECE, count = least(PIECE, width - first);
        run(y + row * width + first, gate + row * gate_stride + first, up ? up + row * up_stride + first : NULL, count,
            kind);
    }
    return 0;
}

/* Turn each head of each row by the row's angles: `y = x cos + rotate_half(x) sin` (Su et al. 2021). y is
 * [rows, heads, width], x has strides of its own; cos and sin are [rows, width]. */
EXPORT int32_t loraplex_rotate(
    int32_t isa, int32_t threads, float *y, const float *x, int64_t row_stride, int64_t head_stride, const float *cos,
    const float *sin, int64_t rows, int64_t heads, int64_t width
) {
    const turn_fn turn = turns[isa];
#pragma omp parallel for num_threads(worth(rows * heads * width * 3, threads)) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            turn(y + (row * heads + head) * width, x + row * row_stride + head * head_stride, cos + row * width,
                 sin + row * width, width / 2);
    return 0;
}
