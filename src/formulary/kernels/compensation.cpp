// The two loops of error compensation (GPTQ): X^T X of many rows, and the walk over the columns of a weight.
// Plain twins: compensation.py. The walk rounds like its twin, so products and sums are not contracted.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vectors.hpp"
#ifdef __AVX512BF16__
#include <immintrin.h>
#define UNROLLED _Pragma("GCC unroll 8")
#endif

constexpr int64_t PANEL = 48, DEPTH = 128, TALL = 8, WIDE = PANEL / 16;

// TALL columns of one panel times the 48 of another, over `depth` rows; added to `to`.
static inline void tile(const float* left, const float* right, int64_t depth, float* to, int64_t step) {
    v16 sums[TALL][WIDE] = {};
    for (int64_t t = 0; t < depth; ++t, left += PANEL, right += PANEL) {
        v16 x[WIDE];
        for (int w = 0; w < WIDE; ++w) x[w] = load(right + 16 * w);
        for (int r = 0; r < TALL; ++r)
            for (int w = 0; w < WIDE; ++w) sums[r][w] += left[r] * x[w];
    }
    for (int r = 0; r < TALL; ++r)
        for (int w = 0; w < WIDE; ++w) store(to + r * step + 16 * w, load(to + r * step + 16 * w) + sums[r][w]);
}

// gram (wide, wide) += the products of `rows` rows of words, on and above the diagonal's panels. `lay(row, column, to)` lays out
// the PANEL words of a row from that column on.
template <class Word, class Lay, class Tile>
static int add_products(int64_t rows, int64_t wide, float* gram, Lay lay, Tile tile) {
    const int64_t panels = wide / PANEL;
    Word* packed = static_cast<Word*>(std::aligned_alloc(64, panels * DEPTH * PANEL * sizeof(Word)));
    if (!packed) return 1;
    for (int64_t start = 0; start < rows; start += DEPTH) {
        const int64_t depth = rows - start < DEPTH ? rows - start : DEPTH;
#pragma omp parallel
        {
#pragma omp for schedule(static)
            for (int64_t p = 0; p < panels; ++p)
                for (int64_t t = 0; t < depth; ++t) lay(start + t, p * PANEL, packed + (p * DEPTH + t) * PANEL);
#pragma omp for schedule(dynamic)
            for (int64_t q = 0; q < panels; ++q)
                for (int64_t i = 0; i < (q + 1) * PANEL; i += TALL)
                    tile(packed + i / PANEL * DEPTH * PANEL + i % PANEL, packed + q * DEPTH * PANEL, depth,
                         gram + i * wide + q * PANEL, wide);
        }
    }
    std::free(packed);
    return 0;
}

// gram (wide, wide) += x^T x on and above the diagonal's panels, for x (rows, columns) and `wide` columns rounded up to panels.
extern "C" int add_gram(const float* x, int64_t rows, int64_t columns, int64_t wide, float* gram) {
    const auto lay = [=](int64_t row, int64_t column, float* to) {
        const int64_t width = columns - column < PANEL ? columns - column : PANEL;
        std::memcpy(to, x + row * columns + column, width * sizeof(float));
        for (int64_t j = width; j < PANEL; ++j) to[j] = 0.0f;
    };
    return add_products<float>(rows, wide, gram, lay, [](auto... given) { tile(given...); });
}

#ifdef __AVX512BF16__
// `tile` of pairs of rows in bfloat16: each word of 32 bits holds a column of both.
static inline void tile_of_halves(const uint32_t* left, const uint32_t* right, int64_t depth, float* to, int64_t step) {
    __m512 sums[TALL][WIDE];
    UNROLLED for (int r = 0; r < TALL; ++r) UNROLLED for (int w = 0; w < WIDE; ++w) sums[r][w] = _mm512_setzero_ps();
    for (int64_t t = 0; t < depth; ++t, left += PANEL, right += PANEL) {
        __m512i x[WIDE];
        UNROLLED for (int w = 0; w < WIDE; ++w) x[w] = _mm512_loadu_si512(right + 16 * w);
        UNROLLED for (int r = 0; r < TALL; ++r) {
            const __m512i pair = _mm512_set1_epi32(left[r]);
            UNROLLED for (int w = 0; w < WIDE; ++w) asm("vdpbf16ps %2, %1, %0" : "+v"(sums[r][w]) : "v"(pair), "v"(x[w]));
        }
    }
    UNROLLED for (int r = 0; r < TALL; ++r) UNROLLED for (int w = 0; w < WIDE; ++w) {
        float* place = to + r * step + 16 * w;
        _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), sums[r][w]));
    }
}

static inline __m512i halves_of(const float* row, __mmask16 lanes) {
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, row));
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(half));
}

static inline __m512i halves_of(const uint16_t* row, __mmask16 lanes) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row));
}

template <class Value>
static int add_halves(const Value* x, int64_t rows, int64_t columns, int64_t wide, float* gram) {
    const auto lay = [=](int64_t pair, int64_t column, uint32_t* to) {
        const Value* row = x + 2 * pair * columns;
        for (int64_t c = column; c < column + PANEL; c += 16, to += 16) {
            const int64_t left = columns - c;
            const __mmask16 lanes = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
            __m512i words = halves_of(row + c, lanes);
            if (2 * pair + 1 < rows) words = _mm512_or_si512(words, _mm512_slli_epi32(halves_of(row + columns + c, lanes), 16));
            _mm512_storeu_si512(to, words);
        }
    };
    return add_products<uint32_t>((rows + 1) / 2, wide, gram, lay, [](auto... given) { tile_of_halves(given...); });
}

// `add_gram` of the rows rounded to bfloat16.
extern "C" int add_gram_of_halves(const float* x, int64_t rows, int64_t columns, int64_t wide, float* gram) {
    return add_halves(x, rows, columns, wide, gram);
}

// `add_gram` of rows in bfloat16.
extern "C" int add_gram_of_bfloat16(const uint16_t* x, int64_t rows, int64_t columns, int64_t wide, float* gram) {
    return add_halves(x, rows, columns, wide, gram);
}
#endif

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#if defined(__clang__)
#pragma clang fp contract(off)
#endif

// Columns first to last of `block` (end, rows), each replaced by its nearest levels, 0 to `top`, whose codes go to `codes`
// (end, rows); columns after it, up to `end`, make up for the errors. `upper` (end, end) is the factor of the inverse Hessian;
// scale and zero are (groups, rows), and column i has those of group[i].
extern "C" void walk(float* block, int64_t first, int64_t last, int64_t end, int64_t rows, const float* upper, const float* scale,
                     const float* zero, const int64_t* group, float top, uint8_t* codes) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r += 16) {
        const int64_t lanes = rows - r < 16 ? rows - r : 16;
        v16* own = static_cast<v16*>(std::aligned_alloc(64, (end - first) * sizeof(v16)));
        for (int64_t j = first; j < end; ++j) {
            v16 x = {};
            std::memcpy(&x, block + j * rows + r, lanes * sizeof(float));
            own[j - first] = x;
        }
        for (int64_t i = first; i < last; ++i) {
            v16 s = all(1.0f), z = {};
            std::memcpy(&s, scale + group[i] * rows + r, lanes * sizeof(float));
            std::memcpy(&z, zero + group[i] * rows + r, lanes * sizeof(float));
            const v16 x = own[i - first];
            const v16 least = -z, most = top - z;
            v16 level = x / s;
            level = level < least ? least : level;
            level = level > most ? most : level;
            level = (level + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer, ties to even
            const v16 chosen = level * s;
            const v16 error = (x - chosen) / upper[i * end + i];
            own[i - first] = chosen;
            for (int64_t k = 0; k < lanes; ++k) codes[i * rows + r + k] = static_cast<uint8_t>(level[k] + z[k]);
            for (int64_t j = i + 1; j < end; ++j) own[j - first] = own[j - first] - upper[i * end + j] * error;
        }
        for (int64_t j = first; j < end; ++j) std::memcpy(block + j * rows + r, &own[j - first], lanes * sizeof(float));
        std::free(own);
    }
}
#pragma GCC pop_options
