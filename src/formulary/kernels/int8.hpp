// A linear map in 8-bit integers with a scale per row and per output and outliers in floating point (arXiv:2208.07339, equation 8),
// on AMX tiles or AVX-512 VNNI. Sums of integers are exact, so both give the same result. Plain twin: int8.py.
#pragma once
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define HAS_INT8 1
#include <immintrin.h>
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace formulary {

constexpr int64_t FEW = 4;    // up to so many rows, as in decoding, reading the weights is what takes time
constexpr int64_t ROWS = 64;  // rows that are worked on at once: what belongs to them stays in the second-level cache

struct Linear {            // as in int8.py
    const int8_t* packed;  // (wide / 16, deep / 4, 16, 4): four inputs of 16 outputs side by side
    const int32_t* sums;   // (wide) 128 times the sum of an output's integers
    const float *scale, *bias;                 // (wide)
    int64_t inputs, outputs, deep, wide;       // padded with zeros: deep to a multiple of 64, wide of 32
    float threshold;
};

static inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

// run(j, lanes) over n values, 16 at a time; whole vectors without a mask.
template <class Run>
static inline void by_vectors(int64_t n, Run run) {
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) run(j, __mmask16(0xffff));
    if (j < n) run(j, lanes(n - j));
}

// 32 values from `n` on, those below `size`.
static inline void put(float* row, int64_t n, int64_t size, const __m512* out) {
    if (n + 32 <= size) {
        _mm512_storeu_ps(row + n, out[0]);
        _mm512_storeu_ps(row + n + 16, out[1]);
        return;
    }
    _mm512_mask_storeu_ps(row + n, lanes(size - n), out[0]);
    _mm512_mask_storeu_ps(row + n + 16, lanes(size - n - 16), out[1]);
}

// ROWS rows in integers, and the outliers of each.
struct Rows {
    std::vector<int8_t> integers;  // (ROWS, deep); beyond w.inputs anything, since the weights are zero there
    float step[ROWS];
    int64_t first[ROWS + 1];
    std::vector<int32_t> column;
    std::vector<float> value;
    int64_t deep = 0;

    void start(const Linear& w) {
        deep = w.deep;
        integers.resize(ROWS * deep);
        column.clear();
        value.clear();
        first[0] = 0;
    }

    void quantize(int64_t r, const float* x, const Linear& w) {
        const int64_t n = w.inputs;
        const float threshold = w.threshold;
        const __m512i positive = _mm512_set1_epi32(0x7fffffff);
        int32_t limit;
        std::memcpy(&limit, &threshold, 4);
        // magnitudes are ordered as their bits are, NaN above infinity
        __m512i most = _mm512_setzero_si512();
        by_vectors(n, [&](int64_t j, __mmask16 m) {
            most = _mm512_max_epi32(most, _mm512_and_epi32(_mm512_castps_si512(_mm512_maskz_loadu_ps(m, x + j)), positive));
        });
        int32_t top = _mm512_reduce_max_epi32(most);
        const bool clean = top < limit;
        if (!clean) {
            const __m512i limits = _mm512_set1_epi32(limit);
            most = _mm512_setzero_si512();
            by_vectors(n, [&](int64_t j, __mmask16 m) {
                const __m512i size = _mm512_and_epi32(_mm512_castps_si512(_mm512_maskz_loadu_ps(m, x + j)), positive);
                const __mmask16 out = _mm512_mask_cmpge_epi32_mask(m, size, limits);
                most = _mm512_max_epi32(most, _mm512_maskz_mov_epi32(~out, size));
                for (uint32_t bits = out; bits; bits &= bits - 1) {
                    column.push_back(j + __builtin_ctz(bits));
                    value.push_back(x[j + __builtin_ctz(bits)]);
                }
            });
            top = _mm512_reduce_max_epi32(most);
        }
        float size;
        std::memcpy(&size, &top, 4);
        size /= 127.0f;
        if (!(size >= 1e-30f)) size = 1e-30f;
        step[r] = size;
        const __m512 inverse = _mm512_set1_ps(1.0f / size);
        int8_t* to = integers.data() + r * deep;
        const auto round = [&](int64_t j, __m512 values) {
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm512_cvtepi32_epi8(rounded));
        };
        if (clean)
            by_vectors(n, [&](int64_t j, __mmask16 m) { round(j, _mm512_maskz_loadu_ps(m, x + j)); });
        else
            by_vectors(n, [&](int64_t j, __mmask16 m) {
                const __m512 some = _mm512_maskz_loadu_ps(m, x + j);
                const __m512i size = _mm512_and_epi32(_mm512_castps_si512(some), positive);
                round(j, _mm512_maskz_mov_ps(_mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(limit)), some));
            });
        first[r + 1] = static_cast<int64_t>(column.size());
    }
};

#ifdef HAS_AMX
struct Tiles {  // eight tiles of 16 rows of 64 bytes, for as long as this lives
    explicit Tiles(bool wanted) : on(wanted) {
        if (!on) return;
        alignas(64) uint8_t shape[64] = {1};
        for (int t = 0; t < 8; ++t) {
            reinterpret_cast<uint16_t*>(shape + 16)[t] = 64;
            shape[48 + t] = 16;
        }
        _tile_loadconfig(shape);
    }
    ~Tiles() {
        if (on) _tile_release();
    }
    bool on;
};

// sums (32, 32) = 32 rows of `a` times the outputs of two panels
static inline void tile_sums(const int8_t* a, int64_t deep, const int8_t* b, bool both, int32_t* sums) {
    const int8_t* second = b + 16 * deep;
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < deep; k += 64) {
            _tile_loadd(4, a + k, deep);
            _tile_loadd(6, b + 16 * k, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, second + 16 * k, 64);
            _tile_dpbssd(1, 4, 7);
            _tile_loadd(5, a + 16 * deep + k, deep);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(2, sums + 16 * 32, 128);
        _tile_stored(3, sums + 16 * 32 + 16, 128);
    } else {
        for (int64_t k = 0; k < deep; k += 64) {
            _tile_loadd(4, a + k, deep);
            _tile_loadd(6, b + 16 * k, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, second + 16 * k, 64);
            _tile_dpbssd(1, 4, 7);
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
}
#else
struct Tiles {
    explicit Tiles(bool) {}
};
#endif

// sum + four products of unsigned and signed bytes, in every lane. In assembly, since GCC moves the sums of the intrinsic from
// register to register and to memory, which halves the speed; so do loops over sums that it does not unroll early.
static inline __m512i dot(__m512i sum, __m512i u, __m512i s) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
    return sum;
}
#define UNROLLED _Pragma("GCC unroll 16")
#define APART __attribute__((noinline)) static

static inline __m512i four_of(const int8_t* x) {  // four bytes, in every lane
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

// The same for N rows with VNNI, whose left operand is unsigned: 128 more, taken off again. 16 * deep bytes from `next` on, what later
// rows or outputs need, come nearer meanwhile: without that, the first rows of a panel wait for it.
template <int N>
APART void vector_sums(const int8_t* a, int64_t deep, const int8_t* b, const int8_t* next, const int32_t* more, int32_t* sums) {
    const int8_t* second = b + 16 * deep;
    const __m512i high = _mm512_set1_epi32(0x80808080);
    __m512i total[N][2];
    UNROLLED for (int r = 0; r < N; ++r) total[r][0] = total[r][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < deep; k += 4) {
        const __m512i w0 = _mm512_loadu_si512(b + 16 * k), w1 = _mm512_loadu_si512(second + 16 * k);
        _mm_prefetch(reinterpret_cast<const char*>(next + 16 * k), _MM_HINT_T1);
        UNROLLED for (int r = 0; r < N; ++r) {
            const __m512i x = _mm512_xor_si512(four_of(a + r * deep + k), high);
            total[r][0] = dot(total[r][0], x, w0);
            total[r][1] = dot(total[r][1], x, w1);
        }
    }
    UNROLLED for (int r = 0; r < N; ++r)
        UNROLLED for (int h = 0; h < 2; ++h)
            _mm512_storeu_si512(sums + 32 * r + 16 * h, _mm512_sub_epi32(total[r][h], _mm512_loadu_si512(more + 16 * h)));
}

// The same for a few rows, as in decoding: 16 outputs after the other, so that the weights are read in one stream, past the
// caches, where what the caller works with can stay.
constexpr int64_t AHEAD = 4096;
template <int N>
APART void stream_sums(const int8_t* a, int64_t deep, const int8_t* b, const int32_t* more, int32_t* sums) {
    constexpr int M = N == 1 ? 4 : N == 2 ? 2 : 1;  // sums of a row, so that none waits for itself
    const __m512i high = _mm512_set1_epi32(0x80808080);
    for (int h = 0; h < 2; ++h, b += 16 * deep) {
        __m512i total[N][M];
        UNROLLED for (int r = 0; r < N; ++r) UNROLLED for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_si512();
        for (int64_t k = 0; k < deep; k += 4 * M)
            UNROLLED for (int m = 0; m < M; ++m) {
                _mm_prefetch(reinterpret_cast<const char*>(b + 16 * k + 64 * m + AHEAD), _MM_HINT_NTA);
                const __m512i w = _mm512_loadu_si512(b + 16 * k + 64 * m);
                UNROLLED for (int r = 0; r < N; ++r)
                    total[r][m] = dot(total[r][m], _mm512_xor_si512(four_of(a + r * deep + k + 4 * m), high), w);
            }
        UNROLLED for (int r = 0; r < N; ++r) {
            UNROLLED for (int m = 1; m < M; ++m) total[r][0] = _mm512_add_epi32(total[r][0], total[r][m]);
            _mm512_storeu_si512(sums + 32 * r + 16 * h, _mm512_sub_epi32(total[r][0], _mm512_loadu_si512(more + 16 * h)));
        }
    }
}

// finish(row, output, values) for every row and, 32 at a time, every output of w, padded ones too.
template <class Finish>
static inline void multiply_panel(const Linear& w, const Rows& x, int64_t rows, bool amx, int64_t n, Finish finish) {
    alignas(64) int32_t sums[32 * 32];
    const int8_t *integers = x.integers.data(), *panel = w.packed + n * w.deep;
    const __m512 scale[2] = {_mm512_loadu_ps(w.scale + n), _mm512_loadu_ps(w.scale + n + 16)};
    const __m512 bias[2] = {_mm512_loadu_ps(w.bias + n), _mm512_loadu_ps(w.bias + n + 16)};
    for (int64_t start = 0; start < rows; start += 32) {
        const int64_t count = std::min<int64_t>(32, rows - start);
        const int8_t* a = integers + start * w.deep;
#ifdef HAS_AMX
        if (amx && count > FEW) {
            tile_sums(a, w.deep, panel, count > 16, sums);
        } else
#endif
        {
            int64_t r = 0;
            for (; r + 8 <= count; r += 8) {
                const int64_t turn = (start + r) / 8;
                const int8_t* next = panel + (turn == 1 || turn == 2 ? (16 + 16 * turn) * w.deep : 0);
                vector_sums<8>(a + r * w.deep, w.deep, panel, next, w.sums + n, sums + 32 * r);
            }
            const int8_t* rest = a + r * w.deep;
            for (; r + FEW <= count; r += FEW, rest += FEW * w.deep) stream_sums<FEW>(rest, w.deep, panel, w.sums + n, sums + 32 * r);
            switch (count - r) {
                case 3: stream_sums<3>(rest, w.deep, panel, w.sums + n, sums + 32 * r); break;
                case 2: stream_sums<2>(rest, w.deep, panel, w.sums + n, sums + 32 * r); break;
                case 1: stream_sums<1>(rest, w.deep, panel, w.sums + n, sums + 32 * r); break;
            }
        }
        for (int64_t r = 0; r < count; ++r) {
            const int64_t row = start + r;
            const __m512 step = _mm512_set1_ps(x.step[row]);
            __m512 out[2];
            for (int h = 0; h < 2; ++h) {
                const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 32 * r + 16 * h));
                out[h] = _mm512_fmadd_ps(_mm512_mul_ps(whole, scale[h]), step, bias[h]);
            }
            for (int64_t o = x.first[row]; o < x.first[row + 1]; ++o) {
                const int64_t k = x.column[o];
                const __m512 value = _mm512_set1_ps(x.value[o]);
                const __m128i left = _mm_cvtsi32_si128(24 - 8 * (k & 3));
                for (int h = 0; h < 2; ++h) {
                    const __m512i four = _mm512_loadu_si512(panel + 16 * h * w.deep + 16 * (k & ~int64_t(3)));
                    const __m512i code = _mm512_srai_epi32(_mm512_sll_epi32(four, left), 24);
                    out[h] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(code), scale[h]), value, out[h]);
                }
            }
            finish(row, n, out);
        }
    }
}

// All of w. A few rows share its outputs among threads; more are cut into blocks of ROWS by the caller, a thread each.
template <class Finish>
static inline void multiply(const Linear& w, const Rows& x, int64_t rows, bool amx, Finish finish) {
    if (rows > FEW) {
        for (int64_t n = 0; n < w.wide; n += 32) multiply_panel(w, x, rows, amx, n, finish);
        return;
    }
#pragma omp parallel for schedule(static) if (w.wide * w.deep > 262144)
    for (int64_t n = 0; n < w.wide; n += 32) multiply_panel(w, x, rows, false, n, finish);
}

}  // namespace formulary
#endif
