// Vectors of 16 floats, which the compiler maps to whatever the processor has, and what is built on them: exp, GELU, and
// attention of a few queries over the keys of one head.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16v __attribute__((vector_size(64), aligned(4)));

static inline v16 load(const float* p) {
    v16 x;
    std::memcpy(&x, p, 64);
    return x;
}
static inline void store(float* p, v16 x) { std::memcpy(p, &x, 64); }
static inline v16 all(float x) { return v16{} + x; }
static inline v16 larger(v16 a, v16 b) { return a > b ? a : b; }

#define SWAPPED(x, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p) \
    __builtin_shufflevector(x, x, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)
#define FOLDED(combine)                                                                        \
    x = combine(x, SWAPPED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));          \
    x = combine(x, SWAPPED(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));          \
    x = combine(x, SWAPPED(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));          \
    x = combine(x, SWAPPED(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));          \
    return x[0]
static inline v16 plus(v16 a, v16 b) { return a + b; }
static inline float largest_of(v16 x) { FOLDED(larger); }
static inline float sum_of(v16 x) { FOLDED(plus); }

// exp, relative error below 3e-7 for x in [-87, 88]; smaller x give 0, NaN stays NaN.
static inline v16 exponential(v16 x) {
    const v16 low = all(-87.0f), high = all(88.0f);
    const i16v gone = x < low;
    v16 y = x < low ? low : x;
    y = y > high ? high : y;
    const v16 shifted = y * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
    const v16 n = shifted - 12582912.0f;
    const v16 r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    v16 p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i16v bits;
    std::memcpy(&bits, &shifted, 64);
    const i16v power = (bits - 0x4b400000 + 127) << 23;
    v16 scale;
    std::memcpy(&scale, &power, 64);
    p = p * scale;
    p = gone ? v16{} : p;
    return x == x ? p : x;
}

// x * Phi(x) with the error function of Abramowitz and Stegun 7.1.26, absolute error below 2e-7.
static inline v16 gelu_of(v16 x) {
    const v16 z = (x < 0.0f ? -x : x) * 0.70710678f;
    const v16 t = 1.0f / (z * 0.3275911f + 1.0f);
    v16 p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const v16 tail = 0.5f * p * t * exponential(-z * z);  // 1 - Phi(|x|)
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// ROWS queries times COLUMNS * 16 keys: enough independent sums to keep the multipliers busy.
template <int ROWS, int COLUMNS>
static inline void multiply(const float* query, int64_t query_step, const float* keys, int64_t padded, int64_t width, float scale,
                            float* scores) {
    v16 sum[ROWS][COLUMNS] = {};
    for (int64_t d = 0; d < width; ++d) {
        v16 key[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) key[c] = load(keys + d * padded + 16 * c);
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < COLUMNS; ++c) sum[r][c] += query[r * query_step + d] * key[c];
    }
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) store(scores + r * padded + 16 * c, sum[r][c] * scale);
}

// ROWS rows of queries against the keys of one head: scores, softmax, weighted sum. `keys` is (width, padded), one column a
// key; `values` is (padded, wide) with zeros beyond `width`; `padded` and `wide` are multiples of 16.
template <int ROWS, int WIDE>
static void attend(const float* query, int64_t query_step, const float* keys, const float* values, int64_t length, int64_t padded,
                   int64_t width, float scale, int64_t first, bool causal, float* scores, float* out, int64_t out_step) {
    const int64_t seen = causal ? (first + ROWS < length ? first + ROWS : length) : length;
    const int64_t used = (seen + 15) / 16 * 16;
    int64_t column = 0;
    for (; column + 32 <= used; column += 32)
        multiply<ROWS, 2>(query, query_step, keys + column, padded, width, scale, scores + column);
    if (column < used) multiply<ROWS, 1>(query, query_step, keys + column, padded, width, scale, scores + column);
    float share[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        float* row = scores + r * padded;
        const int64_t count = causal ? first + r + 1 : length;
        for (int64_t j = count; j < used; ++j) row[j] = -INFINITY;
        v16 most = load(row);
        for (int64_t j = 16; j < used; j += 16) most = larger(load(row + j), most);
        const float top = largest_of(most);
        v16 sum = {};
        for (int64_t j = 0; j < used; j += 16) {
            const v16 weight = exponential(load(row + j) - top);
            store(row + j, weight);
            sum += weight;
        }
        share[r] = 1.0f / sum_of(sum);
    }
    for (int64_t c = 0; c < width; c += 16 * WIDE) {
        v16 sum[ROWS][WIDE] = {};
        for (int64_t j = 0; j < seen; ++j) {
            for (int w = 0; w < WIDE; ++w) {
                const v16 value = load(values + j * ((width + 16 * WIDE - 1) / (16 * WIDE) * 16 * WIDE) + c + 16 * w);
                for (int r = 0; r < ROWS; ++r) sum[r][w] += scores[r * padded + j] * value;
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int w = 0; w < WIDE; ++w) {
                const int64_t left = width - c - 16 * w;
                float* to = out + r * out_step + c + 16 * w;
                if (left >= 16) {
                    store(to, sum[r][w] * share[r]);
                } else if (left > 0) {
                    float lane[16];
                    store(lane, sum[r][w] * share[r]);
                    std::memcpy(to, lane, left * sizeof(float));
                }
            }
    }
}
