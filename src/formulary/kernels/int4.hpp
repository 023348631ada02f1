// A linear map with 4-bit weights in groups of inputs, scale (code - zero), and inputs rounded to 8 bits in blocks, with
// AVX-512 VNNI. Sums of integers are exact within a block, floating point beyond. Plain twin: int4.py.
#pragma once
#include "int8.hpp"

#ifdef HAS_INT8
namespace formulary {

struct Linear4 {            // as in int4.py
    const uint8_t* packed;  // (wide / 16, groups): codes (group / 8, 16, 4), 16 scales in half precision, 16 zero points in bytes
    const float *scale, *bias;  // (wide) the scales are in units of `scale`
    const int32_t* order;       // (deep) which input stands at each place, beyond the last one -1; or null: in order
    int64_t inputs, outputs, deep, wide, group, block;  // deep: whole groups; group: whole blocks; block: a multiple of 8

    int64_t bytes() const { return 8 * group + 48; }  // of a group of 16 outputs
};

// ROWS rows in integers, `step` apart in each block, and sums of these.
struct Rows4 {
    std::vector<int8_t> integers;       // (ROWS, deep)
    std::vector<float> step, total;     // (ROWS, blocks), (ROWS, groups) the sum of the rounded inputs
    std::vector<int32_t> sum;           // (ROWS, blocks) of the integers
    std::vector<float> ordered;
    int64_t blocks = 0, groups = 0;

    void start(const Linear4& w) {
        blocks = w.deep / w.block;
        groups = w.deep / w.group;
        integers.resize(ROWS * w.deep);
        step.resize(ROWS * blocks);
        sum.resize(ROWS * blocks);
        total.resize(ROWS * groups);
    }

    void quantize(int64_t r, const float* x, const Linear4& w) {
        int64_t n = w.inputs;
        if (w.order) {
            n = w.deep;
            ordered.resize(n);
            for (int64_t j = 0; j < n; ++j) ordered[j] = w.order[j] < 0 ? 0.0f : x[w.order[j]];
            x = ordered.data();
        }
        float* totals = total.data() + r * groups;
        std::fill(totals, totals + groups, 0.0f);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t from = b * w.block, to = from + w.block;
            const __m512i positive = _mm512_set1_epi32(0x7fffffff);
            __m512i most = _mm512_setzero_si512();  // magnitudes are ordered as their bits are, NaN above infinity
            for (int64_t j = from; j < to; j += 16)
                most = _mm512_max_epi32(most, _mm512_and_epi32(_mm512_castps_si512(some(x, j, to, n)), positive));
            const int32_t top = _mm512_reduce_max_epi32(most);
            float size;
            std::memcpy(&size, &top, 4);
            size = size < 127e-30f ? 1e-30f : size / 127.0f;
            const __m512 inverse = _mm512_set1_ps(1.0f / size);
            __m512i sums = _mm512_setzero_si512();
            for (int64_t j = from; j < to; j += 16) {
                const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(some(x, j, to, n), inverse));
                sums = _mm512_add_epi32(sums, rounded);
                _mm_mask_storeu_epi8(integers.data() + r * w.deep + j, lanes(to - j), _mm512_cvtepi32_epi8(rounded));
            }
            step[r * blocks + b] = size;
            sum[r * blocks + b] = _mm512_reduce_add_epi32(sums);
            totals[from / w.group] += size * sum[r * blocks + b];
        }
    }

    static __m512 some(const float* x, int64_t j, int64_t to, int64_t n) {
        return _mm512_maskz_loadu_ps(lanes(std::min(to, n) - j), x + j);
    }
};

static inline __m512 halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline __m512i bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// out (N, 16): the products of N rows from `row` on with 16 outputs from n on, read once. B: the block, or 0 for any.
template <int N, int B>
APART void stream_groups(const Linear4& w, const Rows4& x, int64_t row, int64_t n, float* out) {
    const int64_t block = B ? B : w.block;
    const int8_t* a = x.integers.data() + row * w.deep;
    const float *step = x.step.data() + row * x.blocks, *total = x.total.data() + row * x.groups;
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t* p = w.packed + n / 16 * x.groups * w.bytes();
    __m512 all[N];
    UNROLLED for (int r = 0; r < N; ++r) all[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < x.groups; ++g) {
        __m512 some[N];
        UNROLLED for (int r = 0; r < N; ++r) some[r] = _mm512_setzero_ps();
        for (int64_t end = w.group; end > 0; end -= block, ++step) {
            __m512i first[N], second[N];
            UNROLLED for (int r = 0; r < N; ++r) first[r] = second[r] = _mm512_setzero_si512();
            for (int64_t k = 0; k < block; k += 8, p += 64, a += 8) {
                _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD), _MM_HINT_NTA);
                const __m512i codes = _mm512_loadu_si512(p);
                const __m512i left = _mm512_and_si512(codes, low), right = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
                UNROLLED for (int r = 0; r < N; ++r) {
                    first[r] = dot(first[r], left, four_of(a + r * w.deep));
                    second[r] = dot(second[r], right, four_of(a + r * w.deep + 4));
                }
            }
            UNROLLED for (int r = 0; r < N; ++r) {
                const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(first[r], second[r]));
                some[r] = _mm512_fmadd_ps(whole, _mm512_set1_ps(step[r * x.blocks]), some[r]);
            }
        }
        const __m512 scale = halves(p), zero = _mm512_cvtepi32_ps(bytes(p + 32));
        UNROLLED for (int r = 0; r < N; ++r)
            all[r] = _mm512_fmadd_ps(scale, _mm512_fnmadd_ps(zero, _mm512_set1_ps(total[r * x.groups + g]), some[r]), all[r]);
        p += 48;
    }
    UNROLLED for (int r = 0; r < N; ++r)
        _mm512_storeu_ps(out + 16 * r, _mm512_fmadd_ps(all[r], _mm512_loadu_ps(w.scale + n), _mm512_loadu_ps(w.bias + n)));
}

// 32 outputs from n on, unpacked for many rows.
struct Panel4 {
    std::vector<uint8_t> codes;  // (2, deep / 4, 16, 4) code - zero + 15
    std::vector<float> scale;    // (groups, 32)

    void unpack(const Linear4& w, int64_t n) {
        const int64_t groups = w.deep / w.group;
        codes.resize(32 * w.deep);
        scale.resize(32 * groups);
        const __m512i low = _mm512_set1_epi8(15);
        const uint8_t* p = w.packed + n / 16 * groups * w.bytes();
        uint8_t* to = codes.data();
        for (int64_t h = 0; h < 32; h += 16)
            for (int64_t g = 0; g < groups; ++g, p += 48) {
                const uint8_t* tail = p + 8 * w.group;
                _mm512_storeu_ps(scale.data() + 32 * g + h, _mm512_mul_ps(halves(tail), _mm512_loadu_ps(w.scale + n + h)));
                const __m512i more = _mm512_sub_epi8(low, _mm512_mullo_epi32(bytes(tail + 32), _mm512_set1_epi32(0x01010101)));
                for (; p < tail; p += 64, to += 128) {
                    const __m512i both = _mm512_loadu_si512(p);
                    _mm512_storeu_si512(to, _mm512_add_epi8(_mm512_and_si512(both, low), more));
                    _mm512_storeu_si512(to + 64, _mm512_add_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), more));
                }
            }
    }
};

// out (N, 32): the products of N rows from `row` on with an unpacked panel.
template <int N, int B>
APART void panel_groups(const Linear4& w, const Rows4& x, int64_t row, const Panel4& panel, const float* bias, float* out) {
    const int64_t block = B ? B : w.block;
    const int8_t* a = x.integers.data() + row * w.deep;
    const float *step = x.step.data() + row * x.blocks, *scale = panel.scale.data();
    const int32_t* sum = x.sum.data() + row * x.blocks;
    const uint8_t *p = panel.codes.data(), *q = p + 16 * w.deep;
    __m512 all[N][2];
    UNROLLED for (int r = 0; r < N; ++r) UNROLLED for (int h = 0; h < 2; ++h) all[r][h] = _mm512_loadu_ps(bias + 16 * h);
    for (int64_t g = 0; g < x.groups; ++g, scale += 32)
        for (int64_t end = w.group; end > 0; end -= block, ++step, ++sum) {
            __m512i some[N][2];
            UNROLLED for (int r = 0; r < N; ++r) some[r][0] = some[r][1] = _mm512_set1_epi32(-15 * sum[r * x.blocks]);
            for (int64_t k = 0; k < block; k += 4, p += 64, q += 64, a += 4) {
                const __m512i left = _mm512_loadu_si512(p), right = _mm512_loadu_si512(q);
                UNROLLED for (int r = 0; r < N; ++r) {
                    const __m512i four = four_of(a + r * w.deep);
                    some[r][0] = dot(some[r][0], left, four);
                    some[r][1] = dot(some[r][1], right, four);
                }
            }
            const __m512 scales[2] = {_mm512_loadu_ps(scale), _mm512_loadu_ps(scale + 16)};
            UNROLLED for (int r = 0; r < N; ++r) {
                const __m512 size = _mm512_set1_ps(step[r * x.blocks]);
                UNROLLED for (int h = 0; h < 2; ++h)
                    all[r][h] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(some[r][h]), size), scales[h], all[r][h]);
            }
        }
    UNROLLED for (int r = 0; r < N; ++r) UNROLLED for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + 32 * r + 16 * h, all[r][h]);
}

template <int N>
static inline void few_groups(const Linear4& w, const Rows4& x, int64_t row, int64_t n, float* out) {
    if (w.block == 32) stream_groups<N, 32>(w, x, row, n, out);
    else stream_groups<N, 0>(w, x, row, n, out);
}

template <int N>
static inline void many_groups(const Linear4& w, const Rows4& x, int64_t row, const Panel4& panel, int64_t n, float* out) {
    if (w.block == 32) panel_groups<N, 32>(w, x, row, panel, w.bias + n, out);
    else panel_groups<N, 0>(w, x, row, panel, w.bias + n, out);
}

// As the `multiply` of int8.hpp: finish(row, output, values) for every row and, 32 at a time, every output.
template <class Finish>
static inline void multiply(const Linear4& w, const Rows4& x, int64_t rows, bool, Finish finish) {
    if (rows <= FEW) {
#pragma omp parallel for schedule(static) if (w.wide * w.deep > 262144)
        for (int64_t n = 0; n < w.wide; n += 32) {
            alignas(64) float sums[2][16 * FEW];
            for (int h = 0; h < 2; ++h) switch (rows) {
                case 1: few_groups<1>(w, x, 0, n + 16 * h, sums[h]); break;
                case 2: few_groups<2>(w, x, 0, n + 16 * h, sums[h]); break;
                case 3: few_groups<3>(w, x, 0, n + 16 * h, sums[h]); break;
                default: few_groups<FEW>(w, x, 0, n + 16 * h, sums[h]);
            }
            for (int64_t r = 0; r < rows; ++r) {
                const __m512 out[2] = {_mm512_load_ps(sums[0] + 16 * r), _mm512_load_ps(sums[1] + 16 * r)};
                finish(r, n, out);
            }
        }
        return;
    }
    thread_local Panel4 panel;
    for (int64_t n = 0; n < w.wide; n += 32) {
        panel.unpack(w, n);
        for (int64_t row = 0; row < rows; row += 6) {
            alignas(64) float sums[32 * 6];
            const int64_t count = std::min<int64_t>(6, rows - row);
            switch (count) {
                case 1: many_groups<1>(w, x, row, panel, n, sums); break;
                case 2: many_groups<2>(w, x, row, panel, n, sums); break;
                case 3: many_groups<3>(w, x, row, panel, n, sums); break;
                case 4: many_groups<4>(w, x, row, panel, n, sums); break;
                case 5: many_groups<5>(w, x, row, panel, n, sums); break;
                default: many_groups<6>(w, x, row, panel, n, sums);
            }
            for (int64_t r = 0; r < count; ++r) {
                const __m512 out[2] = {_mm512_load_ps(sums + 32 * r), _mm512_load_ps(sums + 32 * r + 16)};
                finish(row + r, n, out);
            }
        }
    }
}

}  // namespace formulary
#endif
