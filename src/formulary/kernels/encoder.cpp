// What an encoder does besides its matrix products: embeddings and their norm, attention over sequences of their own lengths, and GELU.
// Plain twins: encoder.py.
#include "vectors.hpp"

extern "C" void gelu_all(const float* x, int64_t n, float* out) {
    const int64_t whole = n / 16 * 16;
#pragma omp parallel for schedule(static) if (n > 65536)
    for (int64_t i = 0; i < whole; i += 16) store(out + i, gelu_of(load(x + i)));
    if (whole < n) {
        float rest[16] = {0};
        std::memcpy(rest, x + whole, (n - whole) * sizeof(float));
        store(rest, gelu_of(load(rest)));
        std::memcpy(out + whole, rest, (n - whole) * sizeof(float));
    }
}

// query (tokens, heads, width), key and value (tokens, shared heads, width), each with steps of its own between tokens and
// heads; sequence s holds the tokens starts[s] to starts[s + 1]. out (tokens, heads, width) is dense.
extern "C" int attention(const float* query, int64_t query_token, int64_t query_head, const float* key, int64_t key_token,
                         int64_t key_head, const float* value, int64_t value_token, int64_t value_head, const int64_t* starts,
                         int64_t sequences, int64_t heads, int64_t groups, int64_t width, float scale, int32_t causal, float* out) {
    constexpr int ROWS = 6, WIDE = 2;
    int failed = 0;
    const int64_t wide = (width + 16 * WIDE - 1) / (16 * WIDE) * 16 * WIDE;
#pragma omp parallel for schedule(dynamic) reduction(| : failed)
    for (int64_t task = 0; task < sequences * heads; ++task) {
        const int64_t s = task / heads, h = task % heads, start = starts[s], length = starts[s + 1] - start;
        if (length <= 0) continue;
        const int64_t padded = (length + 15) / 16 * 16;
        float* scratch = static_cast<float*>(std::malloc((width * padded + padded * wide + ROWS * padded) * sizeof(float)));
        if (!scratch) {
            failed = 1;
            continue;
        }
        float *keys = scratch, *values = keys + width * padded, *scores = values + padded * wide;
        const float* k = key + start * key_token + h / groups * key_head;
        const float* v = value + start * value_token + h / groups * value_head;
        for (int64_t j = 0; j < padded; j += 16)  // 16 keys at a time, whose rows stay in the nearest cache
            for (int64_t d = 0; d < width; ++d)
                for (int64_t i = j; i < j + 16; ++i) keys[d * padded + i] = i < length ? k[i * key_token + d] : 0.0f;
        for (int64_t j = 0; j < length; ++j) {
            std::memcpy(values + j * wide, v + j * value_token, width * sizeof(float));
            for (int64_t d = width; d < wide; ++d) values[j * wide + d] = 0.0f;
        }
        const float* q = query + start * query_token + h * query_head;
        float* to = out + (start * heads + h) * width;
        int64_t i = 0;
        for (; i + ROWS <= length; i += ROWS)
            attend<ROWS, WIDE>(q + i * query_token, query_token, keys, values, length, padded, width, scale, i, causal, scores,
                               to + i * heads * width, heads * width);
        for (; i < length; ++i)
            attend<1, WIDE>(q + i * query_token, query_token, keys, values, length, padded, width, scale, i, causal, scores,
                            to + i * heads * width, heads * width);
        std::free(scratch);
    }
    return failed;
}

// out (tokens, width): LayerNorm of the sum of one row of each table, ids[i][t] of tables[i].
extern "C" void embed(const float* const* tables, const int64_t* const* ids, int64_t count, int64_t tokens, int64_t width,
                      const float* weight, const float* shift, float eps, float* out) {
    const int64_t whole = width / 16 * 16;
#pragma omp parallel for schedule(static) if (tokens * width > 65536)
    for (int64_t t = 0; t < tokens; ++t) {
        float* to = out + t * width;
        std::memcpy(to, tables[0] + ids[0][t] * width, width * sizeof(float));
        for (int64_t i = 1; i < count; ++i) {
            const float* row = tables[i] + ids[i][t] * width;
            for (int64_t d = 0; d < whole; d += 16) store(to + d, load(to + d) + load(row + d));
            for (int64_t d = whole; d < width; ++d) to[d] += row[d];
        }
        v16 sums = {};
        for (int64_t d = 0; d < whole; d += 16) sums += load(to + d);
        float sum = sum_of(sums);
        for (int64_t d = whole; d < width; ++d) sum += to[d];
        const float mean = sum / width;
        v16 squares = {};
        for (int64_t d = 0; d < whole; d += 16) squares += (load(to + d) - mean) * (load(to + d) - mean);
        float square = sum_of(squares);
        for (int64_t d = whole; d < width; ++d) square += (to[d] - mean) * (to[d] - mean);
        const float inverse = 1.0f / std::sqrt(square / width + eps);
        for (int64_t d = 0; d < whole; d += 16) store(to + d, (load(to + d) - mean) * inverse * load(weight + d) + load(shift + d));
        for (int64_t d = whole; d < width; ++d) to[d] = (to[d] - mean) * inverse * weight[d] + shift[d];
    }
}
