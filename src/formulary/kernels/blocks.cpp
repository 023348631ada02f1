// One Transformer block with int8 or 4-bit linears (int8.hpp, int4.hpp) over sequences that stand one after the other: what passes
// between its parts stays in the cache. Plain twin: blocks.py.
#include "int4.hpp"
#include "vectors.hpp"

#ifdef HAS_INT8
#ifdef __AVX512BF16__
#define HAS_HALVES 1
#endif
using namespace formulary;

struct Shape {                                         // as in blocks.py
    const float *weight1, *shift1, *weight2, *shift2;  // norms; a null shift makes it an RMSNorm
    float eps1, eps2, scale;
    int32_t bits, norm_first, activation, gated;  // activation 0: GELU, 1: GELU by tanh, 2: SiLU, 3: ReLU, 4: x sigmoid(1.702 x)
    int64_t heads, groups, width;
};

template <class L>
struct Block : Shape {
    L joint, out, up, down;  // joint: queries, keys and values; up: with a gate, 16 gates and 16 values in turns
};

// run(block) with the linears that the block has.
template <class Run>
static inline void with_linears(const Shape& shape, Run run) {
    if (shape.bits == 4) run(static_cast<const Block<Linear4>&>(shape));
    else run(static_cast<const Block<Linear>&>(shape));
}

static inline __m512 vector_exp(__m512 x) {
    v16 y;
    std::memcpy(&y, &x, 64);
    y = exponential(y);
    std::memcpy(&x, &y, 64);
    return x;
}

static inline __m512 activate(int32_t kind, __m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 z = x;
    switch (kind) {
        case 0: {  // x Phi(x), Phi(x) - 1/2 as x times a polynomial of x^2 for |x| <= 4.4: absolute error below 3e-5
            const __m512 edge = _mm512_set1_ps(4.4f);
            z = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), edge), _mm512_min_ps(edge, x));
            const __m512 t = _mm512_fmsub_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(2.0f / (4.4f * 4.4f)), one);
            __m512 p = _mm512_set1_ps(2.754075708e-03f);
            for (float c : {-7.884151261e-03f, 1.098798754e-02f, -1.597702819e-02f, 2.680211747e-02f, -4.008922038e-02f,
                            5.525053248e-02f, -7.861231428e-02f, 1.604044197e-01f})
                p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c));
            return _mm512_mul_ps(x, _mm512_fmadd_ps(z, p, _mm512_set1_ps(0.5f)));
        }
        case 1:  // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u))
            z = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.5957691216f)),
                              _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), one));
            break;
        case 2: break;
        case 3: return _mm512_max_ps(x, _mm512_setzero_ps());
        default: z = _mm512_mul_ps(x, _mm512_set1_ps(1.702f));
    }
    return _mm512_div_ps(x, _mm512_add_ps(one, vector_exp(_mm512_sub_ps(_mm512_setzero_ps(), z))));
}

// LayerNorm, or without a shift RMSNorm, of n values; `to` may be `x`.
static void normalize(const float* x, int64_t n, const float* weight, const float* shift, float eps, float* to) {
    float mean = 0.0f;
    if (shift) {
        __m512 sum = _mm512_setzero_ps();
        by_vectors(n, [&](int64_t j, __mmask16 m) { sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(m, x + j)); });
        mean = _mm512_reduce_add_ps(sum) / n;
    }
    const __m512 middle = _mm512_set1_ps(mean);
    __m512 squares = _mm512_setzero_ps();
    by_vectors(n, [&](int64_t j, __mmask16 m) {
        const __m512 d = _mm512_maskz_sub_ps(m, _mm512_maskz_loadu_ps(m, x + j), middle);
        squares = _mm512_fmadd_ps(d, d, squares);
    });
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / n + eps));
    by_vectors(n, [&](int64_t j, __mmask16 m) {
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + j), middle), inverse);
        y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(m, weight + j));
        if (shift) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(m, shift + j));
        _mm512_mask_storeu_ps(to + j, m, y);
    });
}

// A step between rows that spreads them over the sets of the cache: an odd number of its lines.
static inline int64_t apart(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

static float* grown(std::vector<float>& memory, int64_t size) {
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
    return memory.data();
}

// ---------------------------------------------------------------- attention

// Keys and values of one group of heads, and what one block of queries needs.
struct Head {
    std::vector<float> floats;
    std::vector<uint16_t> halves;
};

struct View {  // (tokens, width) with a step between tokens
    const float* at;
    int64_t step;
};

#ifdef HAS_HALVES
static inline __m512i pairs(const float* x, int64_t left) {  // 32 floats as bfloat16
    const __m512 low = _mm512_maskz_loadu_ps(lanes(left), x), high = _mm512_maskz_loadu_ps(lanes(left - 16), x + 16);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

static inline void transpose(__m512i r[16]) {  // 16 x 16 words
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 4; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
        r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
    }
}

// 2^x for x <= 0, at least 2^-126, to a relative error of 5e-5, which bfloat16 does not see.
static inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // in this order NaN stays NaN
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.6181291e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// out (16, 32), rows `out_step` apart: 16 rows of `a` in bfloat16, `a_step` apart, times the 32 columns of two panels of `deep` inputs, each
// (deep / 2, 16, 2). Rows beyond `count` may be left out.
#ifdef HAS_AMX
static inline void tile_products(const uint16_t* a, int64_t a_step, int64_t deep, const uint16_t* first, const uint16_t* second, float* out,
                                 int64_t out_step) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < deep; k += 32) {
        _tile_loadd(4, a + k, 2 * a_step);
        _tile_loadd(6, first + 16 * k, 64);
        _tile_loadd(7, second + 16 * k, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, out, 4 * out_step);
    _tile_stored(1, out + 16, 4 * out_step);
}
#endif

static inline __m512 dot_halves(__m512 sum, __m512i a, __m512i b) {  // in assembly as `dot` of int8.hpp, for the same reason
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

template <int N>
APART void vector_products(const uint16_t* a, int64_t a_step, int64_t deep, const uint16_t* first, const uint16_t* second, float* out,
                           int64_t out_step) {
    __m512 sum[N][2];
    UNROLLED for (int r = 0; r < N; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < deep; k += 2) {
        const __m512i left = _mm512_loadu_si512(first + 16 * k), right = _mm512_loadu_si512(second + 16 * k);
        UNROLLED for (int r = 0; r < N; ++r) {
            const __m512i pair = four_of(reinterpret_cast<const int8_t*>(a + r * a_step + k));
            sum[r][0] = dot_halves(sum[r][0], pair, left);
            sum[r][1] = dot_halves(sum[r][1], pair, right);
        }
    }
    UNROLLED for (int r = 0; r < N; ++r) UNROLLED for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + r * out_step + 16 * h, sum[r][h]);
}

static inline void products(bool tiles, const uint16_t* a, int64_t a_step, int64_t count, int64_t deep, const uint16_t* first,
                            const uint16_t* second, float* out, int64_t out_step) {
#ifdef HAS_AMX
    if (tiles) return tile_products(a, a_step, deep, first, second, out, out_step);
#endif
    for (; count >= 8; count -= 8, a += 8 * a_step, out += 8 * out_step) vector_products<8>(a, a_step, deep, first, second, out, out_step);
    for (; count >= 2; count -= 2, a += 2 * a_step, out += 2 * out_step) vector_products<2>(a, a_step, deep, first, second, out, out_step);
    if (count) vector_products<1>(a, a_step, deep, first, second, out, out_step);
}

// `many` heads that share keys and values (length, width), in bfloat16 with float32 sums, on tiles or AVX-512; in float32 where the
// processor lacks bfloat16. Query i sees the keys before first + i + 1 when `causal`.
static void attend_heads(bool tiles, View query, int64_t queries, int64_t many, View key, View value, int64_t length, int64_t width, float scale,
                          bool causal, int64_t first, float* out, int64_t out_step, Head& head) {
    const int64_t keys = (length + 31) / 32 * 32, deep = (width + 31) / 32 * 32, blocks = deep / 32;
    head.halves.resize(2 * keys * deep + 16 * deep + 16 * keys);
    uint16_t *packed_keys = head.halves.data(), *packed_values = packed_keys + keys * deep;
    uint16_t *rows = packed_values + keys * deep, *shares = rows + 16 * deep;
    float* scores = grown(head.floats, 16 * keys + 16 * 32);
    float* product = scores + 16 * keys;
    for (int64_t j = 0; j < keys; j += 16)
        for (int64_t b = 0; b < blocks; ++b) {
            __m512i words[16];
            for (int64_t i = 0; i < 16; ++i)
                words[i] = j + i < length ? pairs(key.at + (j + i) * key.step + 32 * b, width - 32 * b) : _mm512_setzero_si512();
            transpose(words);
            for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(packed_keys + (j / 16 * blocks + b) * 512 + 32 * i, words[i]);
        }
    for (int64_t j = 0; j < keys; j += 2)
        for (int64_t d = 0; d < deep; d += 16) {
            const __mmask16 m = lanes(width - d);
            const __m512 a = _mm512_maskz_loadu_ps(j < length ? m : 0, value.at + j * value.step + d);
            const __m512 b = _mm512_maskz_loadu_ps(j + 1 < length ? m : 0, value.at + (j + 1) * value.step + d);
            const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
            const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b)));
            _mm512_storeu_si512(packed_values + (d / 16 * (keys / 32) + j / 32) * 512 + j % 32 * 16,
                                _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    const float factor = scale * 1.44269504f;
    for (int64_t h = 0; h < many; ++h)
        for (int64_t start = 0; start < queries; start += 16) {
            const int64_t count = std::min<int64_t>(16, queries - start);
            const float* q = query.at + h * width + start * query.step;
            for (int64_t r = 0; r < 16; ++r)
                for (int64_t b = 0; b < blocks; ++b)
                    _mm512_storeu_si512(rows + r * deep + 32 * b,
                                        r < count ? pairs(q + r * query.step + 32 * b, width - 32 * b) : _mm512_setzero_si512());
            const int64_t seen = causal ? std::min(length, first + start + count) : length, used = (seen + 31) / 32 * 32;
            for (int64_t j = 0; j < used; j += 32) {
                const uint16_t* some = packed_keys + j * deep;
                products(tiles, rows, deep, count, deep, some, some + 16 * deep, scores + j, keys);
            }
            float inverse[16];
            for (int64_t r = 0; r < count; ++r) {
                float* row = scores + r * keys;
                const int64_t own = causal ? std::min(length, first + start + r + 1) : length;
                for (int64_t j = own / 16 * 16; j < used; j += 16)
                    _mm512_storeu_ps(row + j, _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), lanes(own - j), row + j));
                __m512 most = _mm512_set1_ps(-INFINITY);
                for (int64_t j = 0; j < used; j += 16) most = _mm512_max_ps(_mm512_loadu_ps(row + j), most);
                const __m512 times = _mm512_set1_ps(factor), top = _mm512_set1_ps(_mm512_reduce_max_ps(most) * factor);
                __m512 sum = _mm512_setzero_ps();
                for (int64_t j = 0; j < used; j += 32) {
                    const __m512 a = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), times, top));
                    const __m512 b = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + j + 16), times, top));
                    sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
                    _mm512_storeu_si512(shares + r * keys + j, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
                }
                inverse[r] = 1.0f / _mm512_reduce_add_ps(sum);
            }
            for (int64_t d = 0; d < deep; d += 32) {
                const uint16_t* columns = packed_values + d / 16 * (keys / 32) * 512;
                products(tiles, shares, keys, count, used, columns, columns + 16 * keys, product, 32);
                for (int64_t r = 0; r < count; ++r)
                    for (int64_t half = 0; half < 32; half += 16)
                        _mm512_mask_storeu_ps(out + (start + r) * out_step + h * width + d + half, lanes(width - d - half),
                                              _mm512_mul_ps(_mm512_loadu_ps(product + 32 * r + half), _mm512_set1_ps(inverse[r])));
            }
        }
}
#else
static void attend_heads(bool, View query, int64_t queries, int64_t many, View key, View value, int64_t length, int64_t width, float scale,
                           bool causal, int64_t first, float* out, int64_t out_step, Head& head) {
    constexpr int COUNT = 6, WIDE = 2;
    const int64_t padded = (length + 15) / 16 * 16, wide = (width + 16 * WIDE - 1) / (16 * WIDE) * 16 * WIDE;
    float* keys = grown(head.floats, width * padded + padded * wide + COUNT * padded);
    float *values = keys + width * padded, *scores = values + padded * wide;
    for (int64_t j = 0; j < padded; ++j)
        for (int64_t d = 0; d < width; ++d) keys[d * padded + j] = j < length ? key.at[j * key.step + d] : 0.0f;
    for (int64_t j = 0; j < length; ++j) {
        std::memcpy(values + j * wide, value.at + j * value.step, width * sizeof(float));
        std::fill(values + j * wide + width, values + (j + 1) * wide, 0.0f);
    }
    for (int64_t h = 0; h < many; ++h) {
        const float* q = query.at + h * width;
        float* to = out + h * width;
        int64_t i = 0;
        for (; i + COUNT <= queries; i += COUNT)
            attend<COUNT, WIDE>(q + i * query.step, query.step, keys, values, length, padded, width, scale, first + i, causal, scores,
                                to + i * out_step, out_step);
        for (; i < queries; ++i)
            attend<1, WIDE>(q + i * query.step, query.step, keys, values, length, padded, width, scale, first + i, causal, scores,
                            to + i * out_step, out_step);
    }
}
#endif

extern "C" int in_halves() {
#ifdef HAS_HALVES
    return 1;
#else
    return 0;
#endif
}

// ---------------------------------------------------------------- the block

inline Rows rows_of(const Linear&) { return {}; }
inline Rows4 rows_of(const Linear4&) { return {}; }

template <class L>
struct Work {
    decltype(rows_of(L())) rows;
    Head head;
    std::vector<float> middle, inner, normed;
};

template <class L>
static Work<L>& work() {
    thread_local Work<L> mine;
    return mine;
}

static inline void add_and_put(float* to, const float* residual, int64_t n, int64_t size, const __m512* out) {
    if (n + 32 <= size) {
        _mm512_storeu_ps(to + n, _mm512_add_ps(out[0], _mm512_loadu_ps(residual + n)));
        _mm512_storeu_ps(to + n + 16, _mm512_add_ps(out[1], _mm512_loadu_ps(residual + n + 16)));
        return;
    }
    const __m512 sums[2] = {_mm512_add_ps(out[0], _mm512_maskz_loadu_ps(lanes(size - n), residual + n)),
                            _mm512_add_ps(out[1], _mm512_maskz_loadu_ps(lanes(size - n - 16), residual + n + 16))};
    put(to, n, size, sums);
}

// Rows of the block's input to queries, keys and values (count, joint.outputs).
template <class L>
static void project(const Block<L>& b, const float* x, int64_t count, bool amx, float* joint, Work<L>& w) {
    const int64_t n = b.joint.inputs;
    w.rows.start(b.joint);
    float* normed = grown(w.normed, n);
    for (int64_t r = 0; r < count; ++r) {
        const float* row = x + r * n;
        if (b.norm_first) {
            normalize(row, n, b.weight1, b.shift1, b.eps1, normed);
            row = normed;
        }
        w.rows.quantize(r, row, b.joint);
    }
    multiply(b.joint, w.rows, count, amx, [&](int64_t r, int64_t o, const __m512* out) {
        put(joint + r * apart(b.joint.outputs), o, b.joint.outputs, out);
    });
}

// What attention gave for some rows, and their input x, to the block's output y.
template <class L>
static void finish(const Block<L>& b, const float* attended, const float* x, int64_t count, bool amx, float* y, Work<L>& w) {
    const int64_t n = b.out.outputs, across = apart(n), wide = apart(b.up.wide);
    float *middle = grown(w.middle, ROWS * across), *inner = grown(w.inner, ROWS * wide), *normed = grown(w.normed, n);
    w.rows.start(b.out);
    for (int64_t r = 0; r < count; ++r) w.rows.quantize(r, attended + r * apart(b.out.inputs), b.out);
    multiply(b.out, w.rows, count, amx, [&](int64_t r, int64_t o, const __m512* out) { add_and_put(middle + r * across, x + r * n, o, n, out); });
    w.rows.start(b.up);
    for (int64_t r = 0; r < count; ++r) {
        float* row = middle + r * across;
        if (!b.norm_first) normalize(row, n, b.weight1, b.shift1, b.eps1, row);
        else normalize(row, n, b.weight2, b.shift2, b.eps2, normed);
        w.rows.quantize(r, b.norm_first ? normed : row, b.up);
    }
    multiply(b.up, w.rows, count, amx, [&](int64_t r, int64_t o, const __m512* out) {
        float* to = inner + r * wide;
        if (b.gated) {
            _mm512_storeu_ps(to + o / 2, _mm512_mul_ps(activate(b.activation, out[0]), out[1]));
        } else {
            _mm512_storeu_ps(to + o, activate(b.activation, out[0]));
            _mm512_storeu_ps(to + o + 16, activate(b.activation, out[1]));
        }
    });
    w.rows.start(b.down);
    for (int64_t r = 0; r < count; ++r) w.rows.quantize(r, inner + r * wide, b.down);
    multiply(b.down, w.rows, count, amx, [&](int64_t r, int64_t o, const __m512* out) { add_and_put(y + r * n, middle + r * across, o, n, out); });
    if (!b.norm_first)
        for (int64_t r = 0; r < count; ++r) normalize(y + r * n, n, b.weight2, b.shift2, b.eps2, y + r * n);
}

// x (tokens, n) -> y (tokens, n), which may be x, for the sequences from `from` to `to`; sequence s holds the tokens starts[s] to
// starts[s + 1], and all of them see each other.
template <class L>
static void encode_block(const Block<L>& b, const float* x, const int64_t* starts, int64_t from, int64_t to, int32_t level, float* y) {
    const int64_t n = b.joint.inputs, joined = apart(b.joint.outputs), attended = apart(b.heads * b.width), many = b.heads / b.groups;
    const int64_t base = starts[from], tokens = starts[to] - base;
    static thread_local std::vector<float> memory;
    float *joint = grown(memory, tokens * (joined + attended)), *context = joint + tokens * joined;
#pragma omp parallel if (tokens > ROWS)
    {
        const Tiles tiles(level == 2);
        Work<L>& w = work<L>();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < tokens; r += ROWS)
            project(b, x + (base + r) * n, std::min(ROWS, tokens - r), level == 2, joint + r * joined, w);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t s = from; s < to; ++s)
            for (int64_t g = 0; g < b.groups; ++g) {
                const int64_t start = starts[s] - base, length = starts[s + 1] - starts[s];
                if (length <= 0) continue;
                const float* at = joint + start * joined;
                const View query{at + g * many * b.width, joined}, key{at + (b.heads + g) * b.width, joined},
                    value{at + (b.heads + b.groups + g) * b.width, joined};
                float* out = context + start * attended + g * many * b.width;
                attend_heads(level == 2, query, length, many, key, value, length, b.width, b.scale, false, 0, out, attended, w.head);
            }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < tokens; r += ROWS)
            finish(b, context + r * attended, x + (base + r) * n, std::min(ROWS, tokens - r), level == 2, y + (base + r) * n, w);
    }
}

// All blocks of a stack, one after the other.
extern "C" void encode(const Shape* const* blocks, int64_t count, const float* x, const int64_t* starts, int64_t sequences, int32_t level,
                       float* y) {
    for (int64_t from = 0, to; from < sequences; from = to) {
        // as many sequences at once as the cache holds: about 512 tokens
        for (to = from + 1; to < sequences && starts[to + 1] - starts[from] <= 512; ++to) {}
        for (int64_t i = 0; i < count; ++i)
            with_linears(*blocks[i], [&](const auto& b) { encode_block(b, i ? y : x, starts, from, to, level, y); });
    }
}

// ---------------------------------------------------------------- decoding

// Rotary positions of `heads` heads in place; cosine and sine (width), both halves alike.
static void rotate(float* x, int64_t heads, int64_t width, const float* cosine, const float* sine) {
    for (int64_t h = 0; h < heads; ++h, x += width)
        for (int64_t i = 0, half = width / 2; i < half; ++i) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cosine[i] - b * sine[i];
            x[i + half] = b * cosine[i + half] + a * sine[i + half];
        }
}

// One query over `count` keys, in float32: for a few queries packing the keys would not pay.
static void attend_one(const float* query, const float* keys, const float* values, int64_t count, int64_t width, float scale, float* out,
                       std::vector<float>& memory) {
    const int64_t padded = (count + 15) / 16 * 16;
    float* scores = grown(memory, padded);
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < padded; j += 16) {
        alignas(64) float some[16];
        for (int64_t i = 0; i < 16; ++i) {
            __m512 sum = _mm512_setzero_ps();
            if (j + i < count)
                for (int64_t d = 0; d < width; d += 16) {
                    const __mmask16 m = lanes(width - d);
                    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, query + d), _mm512_maskz_loadu_ps(m, keys + (j + i) * width + d), sum);
                }
            some[i] = j + i < count ? _mm512_reduce_add_ps(sum) * scale : -INFINITY;
        }
        const __m512 whole = _mm512_load_ps(some);
        _mm512_storeu_ps(scores + j, whole);
        most = _mm512_max_ps(whole, most);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += 16) {
        const __m512 share = vector_exp(_mm512_sub_ps(_mm512_loadu_ps(scores + j), top));
        _mm512_storeu_ps(scores + j, share);
        total = _mm512_add_ps(total, share);
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t d = 0; d < width; d += 16) {
        const __mmask16 m = lanes(width - d);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < count; ++j)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(scores[j]), _mm512_maskz_loadu_ps(m, values + j * width + d), sum);
        _mm512_mask_storeu_ps(out + d, m, _mm512_mul_ps(sum, inverse));
    }
}

// x (batch, length, n) -> y alike, causal, with rotary cosine and sine (batch, length, width). keys and values (batch, groups, room,
// width) hold `past` tokens and receive `length` more.
template <class L>
static void decode_block(const Block<L>& b, const float* x, int64_t batch, int64_t length, const float* cosine, const float* sine,
                         float* keys, float* values, int64_t room, int64_t past, int32_t level, float* y) {
    const int64_t n = b.joint.inputs, joined = apart(b.joint.outputs), attended = apart(b.heads * b.width), many = b.heads / b.groups;
    const int64_t rows = batch * length, width = b.width;
    static thread_local std::vector<float> memory;
    float *joint = grown(memory, rows * (joined + attended)), *context = joint + rows * joined;
#pragma omp parallel if (rows > FEW)
    {
        const Tiles tiles(level == 2 && rows > FEW);
        Work<L>& w = work<L>();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r += ROWS) {
            const int64_t count = std::min(ROWS, rows - r);
            project(b, x + r * n, count, level == 2, joint + r * joined, w);
            for (int64_t t = r; t < r + count; ++t) {
                float* row = joint + t * joined;
                rotate(row, b.heads + b.groups, width, cosine + t * width, sine + t * width);
                for (int64_t g = 0; g < b.groups; ++g) {
                    const int64_t to = ((t / length * b.groups + g) * room + past + t % length) * width;
                    std::memcpy(keys + to, row + (b.heads + g) * width, width * sizeof(float));
                    std::memcpy(values + to, row + (b.heads + b.groups + g) * width, width * sizeof(float));
                }
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < batch * b.groups; ++task) {
            const int64_t i = task / b.groups, g = task % b.groups;
            const float *k = keys + task * room * width, *v = values + task * room * width;
            const float* q = joint + i * length * joined + g * many * width;
            float* out = context + i * length * attended + g * many * width;
            if (length <= FEW) {
                for (int64_t t = 0; t < length; ++t)
                    for (int64_t h = 0; h < many; ++h)
                        attend_one(q + t * joined + h * width, k, v, past + t + 1, width, b.scale, out + t * attended + h * width,
                                   w.head.floats);
                continue;
            }
            const View query{q, joined}, key{k, width}, value{v, width};
            attend_heads(level == 2, query, length, many, key, value, past + length, width, b.scale, true, past, out, attended, w.head);
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r += ROWS)
            finish(b, context + r * attended, x + r * n, std::min(ROWS, rows - r), level == 2, y + r * n, w);
    }
}

// All blocks of a stack, one after the other, and what norms the last one's output, if anything. memory, `step` floats apart for each
// block, holds its keys and values (2, batch, groups, room, width); rows are of n values.
extern "C" void decode(const Shape* const* blocks, int64_t count, const float* x, int64_t batch, int64_t length, int64_t n,
                       const float* cosine, const float* sine, float* memory, int64_t step, int64_t room, int64_t past, const float* weight,
                       const float* shift, float eps, int32_t level, float* y) {
    for (int64_t i = 0; i < count; ++i, memory += step)
        with_linears(*blocks[i], [&](const auto& b) {
            float* values = memory + batch * b.groups * room * b.width;
            decode_block(b, i ? y : x, batch, length, cosine, sine, memory, values, room, past, level, y);
        });
    if (weight)
        for (int64_t r = 0; r < batch * length; ++r) normalize(y + r * n, n, weight, shift, eps, y + r * n);
}
#endif
