/* What happens to a row between two products, for one instruction set. An element's bits do not depend on where it
 * lies: what is left over at a row's end goes through the same vector operations. */

/* `y = weight * (x / sqrt(mean(x^2) + epsilon))`. */
static TARGET void NAME(norm_row)(float *y, const float *x, const float *weight, int64_t width, float epsilon) {
    const int64_t whole = width / LANES * LANES;
    VEC sum[4] = {vzero(), vzero(), vzero(), vzero()};
    int64_t at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES)
        for (int i = 0; i < 4; i++) {
            const VEC v = vload(x + at + i * LANES);
            sum[i] = vfma(v, v, sum[i]);
        }
    for (; at < whole; at += LANES) sum[0] = vfma(vload(x + at), vload(x + at), sum[0]);
    if (whole < width) {
        const VEC v = NAME(vload_part)(x + whole, width - whole);
        sum[1] = vfma(v, v, sum[1]);
    }
    const float mean = NAME(vsum)(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3]))) / (float)width;
    const VEC factor = vset1(1.0f / sqrtf(mean + epsilon));
    for (int64_t i = 0; i < whole; i += LANES) vstore(y + i, vmul(vload(weight + i), vmul(vload(x + i), factor)));
    if (whole < width) {
        const VEC v = vmul(NAME(vload_part)(x + whole, width - whole), factor);
        NAME(vstore_part)(y + whole, vmul(NAME(vload_part)(weight + whole, width - whole), v), width - whole);
    }
}

/* x / (1 + e^-x), or x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))). */
INLINE VEC NAME(activate)(VEC x, const int kind) {
    if (kind == SILU) return x / (vset1(1.0f) + NAME(vexp)(vzero() - x));
    const VEC inner = vset1(0.79788456f) * (x + vset1(0.044715f) * x * x * x);
    return vset1(0.5f) * x * (vset1(1.0f) + NAME(vtanh)(inner));
}

INLINE void NAME(gate_numbers)(float *y, const float *gate, const float *up, int64_t count, const int kind) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        VEC v = NAME(activate)(vload(gate + i), kind);
        if (up) v = vmul(v, vload(up + i));
        vstore(y + i, v);
    }
    if (i == count) return;
    VEC v = NAME(activate)(NAME(vload_part)(gate + i, count - i), kind);
    if (up) v = vmul(v, NAME(vload_part)(up + i, count - i));
    NAME(vstore_part)(y + i, v, count - i);
}

static TARGET void NAME(gate_row)(float *y, const float *gate, const float *up, int64_t count, int64_t kind) {
    if (kind == SILU)
        NAME(gate_numbers)(y, gate, up, count, SILU);
    else
        NAME(gate_numbers)(y, gate, up, count, GELU_TANH);
}

/* The first half of a head turned against the second: y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2. */
static TARGET void NAME(turn_head)(float *y, const float *x, const float *cos, const float *sin, int64_t half) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const VEC one = vload(x + i), two = vload(x + half + i);
        vstore(y + i, vmul(one, vload(cos + i)) - vmul(two, vload(sin + i)));
        vstore(y + half + i, vadd(vmul(two, vload(cos + half + i)), vmul(one, vload(sin + half + i))));
    }
    for (; i < half; i++) {
        const float one = x[i], two = x[half + i];
        y[i] = one * cos[i] - two * sin[i];
        y[half + i] = two * cos[half + i] + one * sin[half + i];
    }
}
