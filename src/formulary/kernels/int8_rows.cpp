// Around an int8 matrix product: activations to integers before it, scales, bias and outliers after it.
// The plain twins are in int8.py; `integers` and `step` agree with them to the bit.
#include <cstdint>
#include <cstring>

static inline int32_t magnitude(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits & 0x7fffffff;  // magnitudes of floats are ordered as their bits are, NaN above infinity
}

static inline float as_float(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The largest magnitude below `limit`.
static inline int32_t largest(const float* row, int64_t n, int32_t limit) {
    int32_t found = 0;
    for (int64_t j = 0; j < n; ++j) {
        int32_t m = magnitude(row[j]);
        m = m < limit ? m : 0;
        found = m > found ? m : found;
    }
    return found;
}

// x (rows, n) -> integers (rows, n), step (rows); marks in `outlier` (n) the columns that hold |x| >= threshold.
extern "C" void quantize_rows(const float* x, int64_t rows, int64_t n, float threshold, int8_t* integers, float* step,
                              uint8_t* outlier) {
    const int32_t limit = magnitude(threshold);
#pragma omp parallel for schedule(static) if (rows * n > 65536)
    for (int64_t i = 0; i < rows; ++i) {
        const float* row = x + i * n;
        int8_t* out = integers + i * n;
        const int32_t outer = largest(row, n, INT32_MAX);
        const int32_t inner = outer < limit ? outer : largest(row, n, limit);
        float size = as_float(inner) / 127.0f;
        if (!(size >= 1e-30f)) size = 1e-30f;
        step[i] = size;
        const float inverse = 1.0f / size;
        if (outer < limit) {
            for (int64_t j = 0; j < n; ++j) out[j] = (int8_t)(int32_t)__builtin_rintf(row[j] * inverse);
        } else {
            for (int64_t j = 0; j < n; ++j) {
                const float kept = magnitude(row[j]) < limit ? row[j] : 0.0f;
                out[j] = (int8_t)(int32_t)__builtin_rintf(kept * inverse);
            }
            for (int64_t j = 0; j < n; ++j)
                if (magnitude(row[j]) >= limit) outlier[j] = 1;
        }
    }
}

// out = step * product + bias + sum over `columns` of outliers of x times weight (m, features). product and out may be
// the same memory.
extern "C" void finish_rows(const float* product, int64_t rows, int64_t features, const float* step, const float* bias,
                            const float* x, int64_t n, float threshold, const int64_t* columns, int64_t m,
                            const float* weight, float* out) {
    const int32_t limit = magnitude(threshold);
#pragma omp parallel for schedule(static) if (rows * features > 65536)
    for (int64_t i = 0; i < rows; ++i) {
        const float* from = product + i * features;
        float* to = out + i * features;
        const float size = step[i];
        if (bias)
            for (int64_t k = 0; k < features; ++k) to[k] = from[k] * size + bias[k];
        else
            for (int64_t k = 0; k < features; ++k) to[k] = from[k] * size;
        for (int64_t c = 0; c < m; ++c) {
            const float value = x[i * n + columns[c]];
            if (magnitude(value) < limit) continue;
            const float* line = weight + c * features;
            for (int64_t k = 0; k < features; ++k) to[k] += value * line[k];
        }
    }
}
