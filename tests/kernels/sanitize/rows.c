/* Norms, gates and rotations of rows that fill no vector. */
#include "cases.h"
#include "functions.h"

static void norm_case(int32_t isa, int64_t rows, int64_t width) {
    float *x = floats(rows * width), *weight = floats(width), *y = malloc(rows * width * sizeof(float));
    loraplex_rms_norm(isa, 2, y, x, weight, rows, width, 1e-5f);
    for (int64_t row = 0; row < rows; row++) {
        double squares = 0;
        for (int64_t i = 0; i < width; i++) squares += (double)x[row * width + i] * x[row * width + i];
        for (int64_t i = 0; i < width; i++)
            expect("norm", y[row * width + i], weight[i] * x[row * width + i] / sqrt(squares / width + 1e-5), 1e-5);
    }
    free(x), free(weight), free(y);
}

/* The last row ends where its memory does: rows lie `stride` apart. */
static void gate_case(int32_t isa, int64_t rows, int64_t width, int64_t stride, int64_t kind, int with_up) {
    const int64_t held = (rows - 1) * stride + width;
    float *x = floats(held), *up = with_up ? floats(held) : NULL, *y = malloc(rows * width * sizeof(float));
    loraplex_gate(isa, 2, y, x, stride, up, stride, rows, width, kind);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i++) {
            const double v = x[row * stride + i];
            const double want = kind ? v / 2 * (1 + tanh(0.7978845608 * (v + 0.044715 * v * v * v))) : v / (1 + exp(-v));
            expect("gate", y[row * width + i], want * (up ? up[row * stride + i] : 1), 1e-5);
        }
    free(x), free(up), free(y);
}

static void rotate_case(int32_t isa, int64_t rows, int64_t heads, int64_t width) {
    float *x = floats(rows * heads * width), *cos = floats(rows * width), *sin = floats(rows * width);
    float *y = malloc(rows * heads * width * sizeof(float));
    loraplex_rotate(isa, 2, y, x, width, rows * width, cos, sin, rows, heads, width);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t i = 0; i < width; i++) {
                const float *from = x + (head * rows + row) * width, *angle = sin + row * width;
                const double other = i < width / 2 ? -from[i + width / 2] : from[i - width / 2];
                expect("rotate", y[(row * heads + head) * width + i],
                       (double)from[i] * cos[row * width + i] + other * angle[i], 1e-5);
            }
    free(x), free(cos), free(sin), free(y);
}

void rows(int32_t isa) {
    const int64_t widths[] = {1, 2, 7, 8, 15, 17, 64, 130, 2049};
    for (int64_t i = 0; i < COUNT(widths); i++) {
        norm_case(isa, 3, widths[i]);
        for (int64_t kind = 0; kind < 2; kind++) {
            gate_case(isa, 1, widths[i], widths[i], kind, 0);
            gate_case(isa, 5, widths[i], widths[i] + 3, kind, 1);
        }
        rotate_case(isa, 3, 2, 2 * widths[i]);
    }
}
