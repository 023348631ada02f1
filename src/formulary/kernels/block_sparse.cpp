// Exact attention over chosen blocks of keys, with an online softmax (arXiv:2205.14135), on AVX-512; in bfloat16 on its dot
// products, with float32 sums. Up to 64 queries lie side by side in the lanes: their keys and values are then read as they lie in
// memory, one number for all lanes, and neither the maximum nor the sum of a row goes across lanes. Plain twin: block_sparse.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

struct Rows {  // as in block_sparse.py: steps in bytes; a row is dense
    char* at;
    int64_t batch, head, token;

    char* row(int64_t b, int64_t h, int64_t t) const { return at + b * batch + h * head + t * token; }
};

struct Call {  // as in block_sparse.py
    Rows query, key, value, mask, bias, out;  // a null mask or bias is absent
    const uint8_t* blocks;                    // (batch, heads, blocks of queries, blocks of keys)
    int64_t batch, heads, groups, length, keys, width, wide, block;
    float scale;
    int32_t causal, half, half_bias;  // whether the operands, and the bias, are bfloat16
};

constexpr int64_t LANES = 32, STRIPS = 4, KEYS = 64, WIDEST = 128, TILE = 8;
constexpr int C = LANES / 16;
constexpr float INF = INFINITY;

static inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }
static inline uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t(0) : n <= 0 ? 0 : (uint64_t(1) << n) - 1; }

// A word is a float32, or two bfloat16 that lie side by side: what one lane multiplies and sums at once.
template <bool HALF>
static inline __m512 multiply_add(__m512 word, __m512 words, __m512 sum) {
#ifdef __AVX512BF16__
    if constexpr (HALF)
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(word), reinterpret_cast<__m512bh>(words));
#endif
    return _mm512_fmadd_ps(word, words, sum);
}

// sum[r][c] += left(r, i) right(i, c) over `depth` words: a tile of 8 words by 32 lanes.
template <bool HALF>
static inline void multiply(const char* left, int64_t row, int64_t step, const float* right, int64_t depth, __m512 sum[TILE][C]) {
    for (int64_t i = 0; i < depth; ++i) {
        __m512 words[C];
        for (int c = 0; c < C; ++c) words[c] = _mm512_load_ps(right + i * LANES + 16 * c);
        for (int r = 0; r < TILE; ++r) {
            float one;
            std::memcpy(&one, left + r * row + i * step, 4);
            const __m512 word = _mm512_set1_ps(one);
            for (int c = 0; c < C; ++c) sum[r][c] = multiply_add<HALF>(word, words[c], sum[r][c]);
        }
    }
}

// 2^x for x <= 0, and 0 below -126; NaN stays NaN. Relative error below 2e-7, or 1e-4, which bfloat16 does not see.
template <bool HALF>
static inline __m512 power_of_two(__m512 x) {
    const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x less the integer below
    __m512 p;
    if constexpr (HALF) {
        p = _mm512_set1_ps(7.802452e-2f);
        for (float c : {2.2606718e-1f, 6.9583352e-1f, 9.9992522e-1f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    } else {
        p = _mm512_set1_ps(1.87758e-3f);
        for (float c : {8.98934e-3f, 5.582632e-2f, 2.4015362e-1f, 6.9315307e-1f, 9.9999993e-1f})
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    return _mm512_maskz_scalef_ps(some, p, x);
}

// 16 rows of 16 words turned into columns.
static inline void transpose(__m512i r[16]) {
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

static void transpose_bits(uint64_t a[64]) {
    uint64_t half = 0xffffffff;
    for (int j = 32; j; j >>= 1, half ^= half << j)
        for (int k = 0; k < 64; k = ((k | j) + 1) & ~j) {
            const uint64_t swapped = (a[k] >> j ^ a[k | j]) & half;
            a[k] ^= swapped << j;
            a[k | j] ^= swapped;
        }
}

// 32 queries of one head, a lane each, and what they gathered so far.
struct Strip {
    alignas(64) float query[WIDEST * LANES];  // words of a head's width
    alignas(64) float out[WIDEST * LANES];
    __m512 top[C], total[C];
    int64_t first, count;
    bool fresh;
};

template <bool HALF>
struct Worker {
    const Call& call;
    int64_t b, h;
    const int64_t words;                       // of a head's width
    const char *keys, *values;                 // of the chunk, and the steps between them
    int64_t key_step, value_step;
    alignas(64) float scores[KEYS * LANES];    // then weights, as words
    alignas(64) float bias[KEYS * LANES];
    alignas(64) float copied[KEYS * WIDEST];   // keys, padded to whole tiles
    alignas(64) float paired[KEYS * WIDEST];   // values of two keys to a word
    uint64_t seen[64];                         // for each key, the queries that see it
    Strip strips[STRIPS];

    Worker(const Call& a) : call(a), words(a.width / (HALF ? 2 : 1)) {}

    // `count` queries of one query block from `first` on.
    void attend(int64_t first, int64_t count) {
        const int64_t used = (count + LANES - 1) / LANES, group = h / (call.heads / call.groups);
        for (int64_t q = 0; q < count; ++q)  // too short, each, for the processor to see them coming
            for (int64_t d = 0; d < 4 * words; d += 64) _mm_prefetch(call.query.row(b, h, first + q) + d, _MM_HINT_T0);
        for (int64_t s = 0; s < used; ++s) start(strips[s], first + s * LANES, std::min(LANES, count - s * LANES));
        const int64_t end = call.causal ? std::min(call.keys, first + count) : call.keys;
        const int64_t rows = (call.length + call.block - 1) / call.block, columns = (call.keys + call.block - 1) / call.block;
        const uint8_t* chosen = call.blocks + ((b * call.heads + h) * rows + first / call.block) * columns;
        for (int64_t j = 0; j < columns && j * call.block < end; ++j) {
            if (!chosen[j]) continue;
            const int64_t from = j * call.block;
            while (j + 1 < columns && chosen[j + 1]) ++j;
            const int64_t to = std::min(end, (j + 1) * call.block);
            for (int64_t at = from; at < to; at += KEYS) {
                const int64_t n = std::min(KEYS, to - at);
                take(group, at, n);
                for (int64_t s = 0; s < used; ++s) gather(strips[s], at, n);
            }
        }
        for (int64_t s = 0; s < used; ++s) finish(strips[s]);
    }

    void start(Strip& s, int64_t first, int64_t count) {
        s.first = first;
        s.count = count;
        s.fresh = true;
        for (int c = 0; c < C; ++c) {
            s.top[c] = _mm512_set1_ps(-INF);
            s.total[c] = _mm512_setzero_ps();
            for (int64_t d = 0; d < words; d += 16) {
                __m512i rows[16] = {};
                for (int64_t r = 0; r < 16 && 16 * c + r < count; ++r)
                    rows[r] = _mm512_maskz_loadu_epi32(lanes(words - d), call.query.row(b, h, first + 16 * c + r) + 4 * d);
                transpose(rows);
                for (int64_t i = 0; i < 16 && d + i < words; ++i) _mm512_store_si512(s.query + (d + i) * LANES + 16 * c, rows[i]);
            }
        }
    }

    // `n` keys from `at` on and their values, in the form in which they are multiplied.
    void take(int64_t group, int64_t at, int64_t n) {
        keys = call.key.row(b, group, at);
        key_step = call.key.token;
        if (n % TILE) {
            const int64_t size = 4 * words;
            char* to = reinterpret_cast<char*>(copied);
            for (int64_t j = 0; j < n; ++j) std::memcpy(to + j * size, keys + j * key_step, size);
            std::memset(to + n * size, 0, (TILE - n % TILE) * size);
            keys = to;
            key_step = size;
        }
        values = call.value.row(b, group, at);
        value_step = call.value.token;
        if (!HALF) return;
        for (int64_t j = 0; j < n; j += 2)
            for (int64_t d = 0; d < call.wide; d += 16) {
                const char* from = values + j * value_step + 2 * d;
                const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(0xffff, from));
                const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(j + 1 < n ? 0xffff : 0, from + value_step));
                _mm512_store_si512(paired + j / 2 * call.wide + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        values = reinterpret_cast<const char*>(paired);
        value_step = 4 * call.wide;
    }

    void gather(Strip& s, int64_t at, int64_t n) {
        if (call.causal) n = std::min(n, s.first + s.count - at);
        const int hidden = n <= 0 ? 2 : hide(s, at, n);
        if (hidden == 2) return;
        __m512 most[C], sum[TILE][C];
        for (int c = 0; c < C; ++c) most[c] = _mm512_set1_ps(-INF);
        for (int64_t j = 0; j < n; j += TILE) {
            for (int r = 0; r < TILE; ++r)
                for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
            multiply<HALF>(keys + j * key_step, key_step, 4, s.query, words, sum);
            for (int r = 0; r < TILE; ++r)
                for (int c = 0; c < C; ++c) {
                    _mm512_store_ps(scores + (j + r) * LANES + 16 * c, sum[r][c]);
                    most[c] = _mm512_max_ps(sum[r][c], most[c]);
                }
        }
        if (hidden || call.bias.at || n % TILE) adjust(s, at, n, hidden, most);
        softmax(s, n, most);
        for (int64_t d = 0; d < call.wide; d += TILE) {
            float* out = s.out + d * LANES;
            for (int r = 0; r < TILE; ++r)
                for (int c = 0; c < C; ++c)
                    sum[r][c] = s.fresh ? _mm512_setzero_ps() : _mm512_mul_ps(_mm512_load_ps(out + r * LANES + 16 * c), most[c]);
            multiply<HALF>(values + 4 * d, 4, value_step, scores, HALF ? (n + 1) / 2 : n, sum);
            for (int r = 0; r < TILE; ++r)
                for (int c = 0; c < C; ++c) _mm512_store_ps(out + r * LANES + 16 * c, sum[r][c]);
        }
        s.fresh = false;
    }

    // 0: every query sees all of these keys; 2: none sees any; 1: as `seen` says.
    int hide(const Strip& s, int64_t at, int64_t n) {
        const bool cut = call.causal && at + n - 1 > s.first;
        if (!cut && !call.mask.at) return 0;
        std::fill(seen, seen + 64, ~uint64_t(0));
        if (call.mask.at) {
            for (int64_t q = 0; q < s.count; ++q) {
                const __m512i bytes = _mm512_maskz_loadu_epi8(low_bits(n), call.mask.row(b, h, s.first + q) + at);
                seen[q] = _mm512_test_epi8_mask(bytes, bytes);
            }
            transpose_bits(seen);
        }
        uint64_t any = 0, every = ~uint64_t(0);
        for (int64_t j = 0; j < n; ++j) {
            if (cut) seen[j] &= ~low_bits(at + j - s.first);
            any |= seen[j];
            every &= seen[j];
        }
        const uint64_t own = low_bits(s.count);
        return !(any & own) ? 2 : (every & own) != own;
    }

    // Adds the bias to the scaled scores, hides what may not be seen and finds the largest scores anew.
    void adjust(const Strip& s, int64_t at, int64_t n, int hidden, __m512 most[C]) {
        const bool biased = call.bias.at;
        if (biased) load_bias(s, at, n);
        const __m512 scale = _mm512_set1_ps(call.scale), lowest = _mm512_set1_ps(-1e38f), nothing = _mm512_set1_ps(-INF);
        for (int c = 0; c < C; ++c) {
            most[c] = nothing;
            for (int64_t j = 0; j < n; ++j) {
                float* to = scores + j * LANES + 16 * c;
                __m512 score = _mm512_load_ps(to);
                __mmask16 shown = hidden ? seen[j] >> 16 * c : 0xffff;
                if (biased) {
                    score = _mm512_fmadd_ps(score, scale, _mm512_load_ps(bias + j * LANES + 16 * c));
                    shown &= _mm512_cmp_ps_mask(score, nothing, _CMP_NEQ_UQ);
                    score = _mm512_max_ps(lowest, score);  // in this order NaN stays NaN
                }
                score = _mm512_mask_mov_ps(nothing, shown, score);
                _mm512_store_ps(to, score);
                most[c] = _mm512_max_ps(score, most[c]);
            }
        }
    }

    void load_bias(const Strip& s, int64_t at, int64_t n) {
        for (int c = 0; c < C; ++c)
            for (int64_t j = 0; j < n; j += 16) {
                __m512i rows[16] = {};
                const __mmask16 m = lanes(n - j);
                for (int64_t r = 0; r < 16 && 16 * c + r < s.count; ++r) {
                    const char* row = call.bias.row(b, h, s.first + 16 * c + r) + (call.half_bias ? 2 : 4) * (at + j);
                    if (call.half_bias)
                        rows[r] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, row)), 16);
                    else
                        rows[r] = _mm512_maskz_loadu_epi32(m, row);
                }
                transpose(rows);
                for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(bias + (j + i) * LANES + 16 * c, rows[i]);
            }
    }

    // Scores become weights relative to the largest so far; `most` becomes the factor of what was gathered before.
    void softmax(Strip& s, int64_t n, __m512 most[C]) {
        const __m512 factor = _mm512_set1_ps((call.bias.at ? 1.0f : call.scale) * 1.44269504f);
        for (int c = 0; c < C; ++c) {
            const __m512 largest = _mm512_max_ps(s.top[c], most[c]);
            const __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(-INF), _CMP_NEQ_UQ);
            const __m512 zero = _mm512_maskz_mov_ps(some, largest);
            float* at = scores + 16 * c;
            const auto weight = [&](int64_t j) {
                return power_of_two<HALF>(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(at + j * LANES), zero), factor));
            };
            __m512 sum = _mm512_setzero_ps();
            if constexpr (HALF) {
#ifdef __AVX512BF16__
                for (int64_t j = 0; j < n; j += 2) {
                    const __m512 low = weight(j), high = j + 1 < n ? weight(j + 1) : _mm512_setzero_ps();
                    sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
                    _mm512_store_si512(at + j / 2 * LANES, in_turns(_mm512_cvtne2ps_pbh(high, low)));
                }
#endif
            } else {
                for (int64_t j = 0; j < n; ++j) {
                    const __m512 one = weight(j);
                    sum = _mm512_add_ps(sum, one);
                    _mm512_store_ps(at + j * LANES, one);
                }
            }
            most[c] = power_of_two<HALF>(_mm512_mul_ps(_mm512_sub_ps(s.top[c], zero), factor));
            s.top[c] = largest;
            s.total[c] = _mm512_fmadd_ps(s.total[c], most[c], sum);
        }
    }

    void finish(const Strip& s) {
        for (int c = 0; c < C; ++c) {
            const __mmask16 some = _mm512_cmp_ps_mask(s.total[c], _mm512_setzero_ps(), _CMP_NEQ_UQ);
            const __m512 share = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), s.total[c]);
            for (int64_t d = 0; d < call.wide; d += 16) {
                __m512i rows[16] = {};
                for (int64_t i = 0; i < 16 && !s.fresh; ++i)
                    rows[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(s.out + (d + i) * LANES + 16 * c), share));
                transpose(rows);
                for (int64_t r = 0; r < 16 && 16 * c + r < s.count; ++r)
                    put(call.out.row(b, h, s.first + 16 * c + r), d, _mm512_castsi512_ps(rows[r]));
            }
        }
    }

    static void put(char* row, int64_t d, __m512 x) {
#ifdef __AVX512BF16__
        if constexpr (HALF) {
            const __m256bh halves = _mm512_cvtneps_pbh(x);
            std::memcpy(row + 2 * d, &halves, 32);
            return;
        }
#endif
        _mm512_storeu_ps(row + 4 * d, x);
    }

#ifdef __AVX512BF16__
    // (16 of one, 16 of the other) -> one and the other in turns.
    static __m512i in_turns(__m512bh both) {
        const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i order = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
        return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(both));
    }
#endif
};

template <bool HALF>
static void attend_all(const Call& call) {
    constexpr int64_t MOST = STRIPS * LANES;
    const int64_t parts = (call.block + MOST - 1) / MOST, rows = (call.length + call.block - 1) / call.block;
    const int64_t tasks = call.batch * call.heads * rows * parts;
#pragma omp parallel
    {
        Worker<HALF> worker(call);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t head = task / (rows * parts), inside = task % parts * MOST;
            const int64_t first = task / parts % rows * call.block + inside;
            worker.b = head / call.heads;
            worker.h = head % call.heads;
            const int64_t count = std::min({MOST, call.block - inside, call.length - first});
            if (count > 0) worker.attend(first, count);
        }
    }
}

extern "C" void block_sparse(const Call* call) {
#ifdef __AVX512BF16__
    if (call->half) return attend_all<true>(*call);
#endif
    attend_all<false>(*call);
}

// 0: nothing here; 1: float32; 2: bfloat16 as well.
extern "C" int32_t level() {
#ifdef __AVX512BF16__
    return 2;
#else
    return 1;
#endif
}
#else
extern "C" int32_t level() { return 0; }
#endif
