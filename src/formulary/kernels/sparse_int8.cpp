// A linear map whose weights are 8-bit integers in 4x1 blocks (four outputs that share one input), most of them zero
// (arXiv:2306.16601), with a scale per token and per output. Plain twin: sparse_int8.py.
//
// Tokens are rounded and laid out with one line of a tile for each input: 64 tokens, 16 or 4. Four blocks of four outputs make
// a quad. For each quad the lines of its four inputs are interleaved, so that a token's four values are what VNNI multiplies and
// adds at once; the sums of 4 outputs times 64 tokens stay in 16 registers until the row of blocks is done.
#include "int8.hpp"

#ifdef HAS_INT8
using namespace formulary;

extern "C" int level() { return 1; }

struct Quad {            // four blocks of one row of blocks, empty ones last
    uint16_t column[4];  // their inputs
    int32_t weight[4];   // of each output, the integers for the four inputs
};

struct Sparse {             // as in sparse_int8.py
    const Quad* quads;
    const int32_t* first;   // (wide / 4 + 1) where the quads of each row of blocks begin
    const int32_t* sums;    // (wide) -128 times the sum of an output's integers
    const float *scale, *bias;      // (wide)
    int64_t inputs, outputs, wide;  // wide: outputs padded to a multiple of PANEL
};

// Outputs that are worked on between two writes. Rows of y that are a multiple of 4 kB apart share one set of the first-level
// cache; several lines of a row at once are written up to twice as fast as one.
constexpr int64_t PANEL = 64;

// Each lane of 128 bits as 16 x 16 bytes, turned: by interleaving halves four times.
static inline void turn_lanes(__m512i* a) {
    __m512i b[16];
    for (int stage = 0; stage < 2; ++stage) {
        for (int r = 0; r < 8; ++r) {
            b[2 * r] = _mm512_unpacklo_epi8(a[r], a[r + 8]);
            b[2 * r + 1] = _mm512_unpackhi_epi8(a[r], a[r + 8]);
        }
        for (int r = 0; r < 8; ++r) {
            a[2 * r] = _mm512_unpacklo_epi8(b[r], b[r + 8]);
            a[2 * r + 1] = _mm512_unpackhi_epi8(b[r], b[r + 8]);
        }
    }
}

// Four lines byte by byte: bytes i of all four lie side by side, within lanes of 128 bits, a quarter of each lane in each result.
static inline void interleave(const __m512i* line, __m512i* out) {
    const __m512i a = _mm512_unpacklo_epi8(line[0], line[1]), b = _mm512_unpackhi_epi8(line[0], line[1]);
    const __m512i c = _mm512_unpacklo_epi8(line[2], line[3]), d = _mm512_unpackhi_epi8(line[2], line[3]);
    out[0] = _mm512_unpacklo_epi16(a, c);
    out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, d);
    out[3] = _mm512_unpackhi_epi16(b, d);
}

// The four lanes of `x`, `step` bytes apart.
static inline void put_lanes(__m512i x, void* to, int64_t step) {
    __m128i* at = static_cast<__m128i*>(to);
    step /= 16;
    _mm_storeu_si128(at, _mm512_castsi512_si128(x));
    _mm_storeu_si128(at + step, _mm512_extracti32x4_epi32(x, 1));
    _mm_storeu_si128(at + 2 * step, _mm512_extracti32x4_epi32(x, 2));
    _mm_storeu_si128(at + 3 * step, _mm512_extracti32x4_epi32(x, 3));
}

// The rounded tokens of one tile.
struct Tile {
    std::vector<uint8_t> memory;
    uint8_t *rows = nullptr, *lines = nullptr;  // (64, step) token by token, then (inputs, tokens) line by line
    int64_t tokens = 0, step = 0;               // tokens in a line: 64, 16 or 4
    float scale[ROWS];

    void fill(const float* x, int64_t count, int64_t inputs) {
        tokens = count > 16 ? 64 : count > 4 ? 16 : 4;
        step = ((inputs + 63) / 64 | 1) * 64;  // an odd number of cache lines: rows that lie in different sets
        memory.resize(2 * ROWS * step + 63);
        rows = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        lines = rows + ROWS * step;
        for (int64_t r = 0; r < count; ++r) scale[r] = quantize(x + r * inputs, inputs, rows + r * step);
        if (tokens == 64)
            for (int64_t k = 0; k < inputs; k += 16) turn_64(k);
        else
            for (int64_t k = 0; k < inputs; k += 64) tokens == 16 ? turn_16(k) : turn_4(k);
    }

    // Integers from -127 to 127, plus 128 since VNNI wants them unsigned; what one of them stands for is returned: NaN for a
    // token with a value that is not finite.
    static float quantize(const float* x, int64_t n, uint8_t* to) {
        const __m512i positive = _mm512_set1_epi32(0x7fffffff);
        __m512i most[4] = {};  // magnitudes are ordered as their bits are, NaN above infinity
        int64_t j = 0;
        for (; j + 64 <= n; j += 64)
            for (int i = 0; i < 4; ++i)
                most[i] = _mm512_max_epi32(most[i], _mm512_and_epi32(_mm512_loadu_si512(x + j + 16 * i), positive));
        for (; j < n; j += 16)
            most[0] = _mm512_max_epi32(most[0], _mm512_and_epi32(_mm512_maskz_loadu_epi32(lanes(n - j), x + j), positive));
        most[0] = _mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3]));
        const int32_t top = _mm512_reduce_max_epi32(most[0]);
        float size;
        std::memcpy(&size, &top, 4);
        size /= 127.0f;
        if (size < 1e-30f) size = 1e-30f;
        const __m512 inverse = _mm512_set1_ps(1.0f / size);
        const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
        const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        for (j = 0; j < n; j += 64) {
            __m512i four[4];
            for (int i = 0; i < 4; ++i) {
                const float* from = x + j + 16 * i;
                const __m512 some = j + 64 <= n ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(lanes(n - j - 16 * i), from);
                four[i] = _mm512_cvtps_epi32(_mm512_mul_ps(some, inverse));
            }
            const __m512i low = _mm512_packs_epi32(four[0], four[1]), high = _mm512_packs_epi32(four[2], four[3]);
            const __m512i all = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
            _mm512_store_si512(to + j, _mm512_xor_si512(all, flip));
        }
        return top < 0x7f800000 ? size : __builtin_nanf("");
    }

    // Inputs k to k + 15 of 64 tokens. The tokens of a line come in such an order that `block_row` has them as they were.
    void turn_64(int64_t k) {
        __m512i a[16];
        for (int r = 0; r < 16; ++r) {
            const uint8_t* row = rows + (r / 4 * 16 + r % 4) * step + k;
            a[r] = _mm512_castsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i*>(row)));
            a[r] = _mm512_inserti32x4(a[r], _mm_load_si128(reinterpret_cast<const __m128i*>(row + 4 * step)), 1);
            a[r] = _mm512_inserti32x4(a[r], _mm_load_si128(reinterpret_cast<const __m128i*>(row + 8 * step)), 2);
            a[r] = _mm512_inserti32x4(a[r], _mm_load_si128(reinterpret_cast<const __m128i*>(row + 12 * step)), 3);
        }
        turn_lanes(a);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(lines + 64 * (k + i), a[i]);
    }

    // Inputs k to k + 63 of 16 tokens.
    void turn_16(int64_t k) {
        __m512i a[16];
        for (int r = 0; r < 16; ++r) a[r] = _mm512_load_si512(rows + r * step + k);
        turn_lanes(a);
        for (int i = 0; i < 16; ++i) put_lanes(a[i], lines + 16 * (k + i), 256);
    }

    // Inputs k to k + 63 of 4 tokens.
    void turn_4(int64_t k) {
        __m512i a[4], b[4];
        for (int r = 0; r < 4; ++r) a[r] = _mm512_load_si512(rows + r * step + k);
        interleave(a, b);
        for (int i = 0; i < 4; ++i) put_lanes(b[i], lines + 4 * (k + 4 * i), 64);
    }
};

// The sums of one row of blocks over 16 * N tokens: (4, 16 * N).
template <int N>
static inline void block_row(const Quad* quad, const Quad* end, const uint8_t* lines, const int32_t* start, int32_t* sums) {
    __m512i total[4][N];
    for (int o = 0; o < 4; ++o)
        for (int j = 0; j < N; ++j) total[o][j] = _mm512_set1_epi32(start[o]);
    for (; quad < end; ++quad) {
        __m512i x[N];
        if constexpr (N == 4) {
            __m512i line[4];
            for (int i = 0; i < 4; ++i) line[i] = _mm512_load_si512(lines + 64 * quad->column[i]);
            interleave(line, x);
        } else {
            __m128i line[4];
            for (int i = 0; i < 4; ++i) line[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(lines + 16 * quad->column[i]));
            const __m128i a = _mm_unpacklo_epi8(line[0], line[1]), b = _mm_unpackhi_epi8(line[0], line[1]);
            const __m128i c = _mm_unpacklo_epi8(line[2], line[3]), d = _mm_unpackhi_epi8(line[2], line[3]);
            x[0] = _mm512_castsi128_si512(_mm_unpacklo_epi16(a, c));
            x[0] = _mm512_inserti32x4(x[0], _mm_unpackhi_epi16(a, c), 1);
            x[0] = _mm512_inserti32x4(x[0], _mm_unpacklo_epi16(b, d), 2);
            x[0] = _mm512_inserti32x4(x[0], _mm_unpackhi_epi16(b, d), 3);
        }
        for (int o = 0; o < 4; ++o) {
            const __m512i weight = _mm512_set1_epi32(quad->weight[o]);
            for (int j = 0; j < N; ++j) total[o][j] = _mm512_dpbusd_epi32(total[o][j], x[j], weight);
        }
    }
    for (int o = 0; o < 4; ++o)
        for (int j = 0; j < N; ++j) _mm512_store_si512(sums + 16 * (N * o + j), total[o][j]);
}

// The same over four tokens, a lane each: a row of PANEL outputs for each token, of which this writes four.
static inline void block_row_4(const Quad* quad, const Quad* end, const uint8_t* lines, const int32_t* start, int32_t* sums) {
    const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m128i turn = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i begin = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(start)));
    __m512i total[2] = {begin, _mm512_setzero_si512()};
    const auto add = [&](const Quad& q, __m512i sum) {
        int32_t line[4];
        for (int i = 0; i < 4; ++i) std::memcpy(line + i, lines + 4 * q.column[i], 4);
        const __m128i four = _mm_shuffle_epi8(_mm_set_epi32(line[3], line[2], line[1], line[0]), turn);
        const __m512i x = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(four));
        const __m128i weight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q.weight));
        return _mm512_dpbusd_epi32(sum, x, _mm512_broadcast_i32x4(weight));
    };
    for (; quad + 1 < end; quad += 2) {
        total[0] = add(quad[0], total[0]);
        total[1] = add(quad[1], total[1]);
    }
    if (quad < end) total[0] = add(*quad, total[0]);
    put_lanes(_mm512_add_epi32(total[0], total[1]), sums, 4 * PANEL);
}

// 16 rows of 16 numbers, `step` apart, turned: row i of the result holds number i of each.
static inline void transpose_16(const int32_t* from, int64_t step, __m512i* out) {
    __m512i a[16], b[16];
    for (int r = 0; r < 16; ++r) a[r] = _mm512_load_si512(from + r * step);
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 16; r += 4)
        for (int h = 0; h < 2; ++h) {
            a[r + 2 * h] = _mm512_unpacklo_epi64(b[r + h], b[r + h + 2]);
            a[r + 2 * h + 1] = _mm512_unpackhi_epi64(b[r + h], b[r + h + 2]);
        }
    for (int i = 0; i < 4; ++i) {  // a[4 * g + i]: lane l is number 4 * l + i of rows 4 * g to 4 * g + 3
        const __m512i c = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x44), d = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x44);
        const __m512i e = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xee), f = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xee);
        out[i] = _mm512_shuffle_i32x4(c, d, 0x88);
        out[4 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
        out[8 + i] = _mm512_shuffle_i32x4(e, f, 0x88);
        out[12 + i] = _mm512_shuffle_i32x4(e, f, 0xdd);
    }
}

// Outputs n to n + PANEL - 1 of `count` tokens.
static void panel(const Sparse& w, const Tile& tile, int64_t count, int64_t n, float* y) {
    alignas(64) int32_t sums[PANEL * ROWS];
    for (int64_t b = 0; b < PANEL / 4; ++b) {
        const Quad *quad = w.quads + w.first[n / 4 + b], *end = w.quads + w.first[n / 4 + b + 1];
        const int32_t* start = w.sums + n + 4 * b;
        if (tile.tokens == 64) block_row<4>(quad, end, tile.lines, start, sums + 4 * 64 * b);
        if (tile.tokens == 16) block_row<1>(quad, end, tile.lines, start, sums + 4 * 16 * b);
        if (tile.tokens == 4) block_row_4(quad, end, tile.lines, start, sums + 4 * b);
    }
    for (int64_t start = 0; start < count; start += 16)
        for (int64_t g = 0; g < PANEL; g += 16) {
            const __m512 scale = _mm512_loadu_ps(w.scale + n + g), bias = _mm512_loadu_ps(w.bias + n + g);
            const __mmask16 there = lanes(w.outputs - n - g);
            __m512i row[16];
            if (tile.tokens > 4) transpose_16(sums + g * tile.tokens + start, tile.tokens, row);
            const int64_t more = std::min<int64_t>(16, count - start);
            for (int64_t r = 0; r < more; ++r) {
                const __m512i whole = tile.tokens > 4 ? row[r] : _mm512_load_si512(sums + PANEL * r + g);
                const __m512 step = _mm512_set1_ps(tile.scale[start + r]);
                const __m512 out = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale), step, bias);
                _mm512_mask_storeu_ps(y + (start + r) * w.outputs + n + g, there, out);
            }
        }
}

// This thread's tile, by a function so that its address is looked up once and not at every use.
static __attribute__((noinline)) Tile& own_tile() {
    thread_local Tile tile;
    return tile;
}

// x (rows, inputs) -> y (rows, outputs). Threads share tiles and, where there are fewer tiles than threads, outputs.
extern "C" void linear(const Sparse* weights, const float* x, int64_t rows, int64_t threads, float* y) {
    const Sparse& w = *weights;
    const int64_t tiles = (rows + ROWS - 1) / ROWS, panels = w.wide / PANEL;
    if (!rows) return;
    if (rows * w.first[w.wide / 4] < 32768) threads = 1;
    const int64_t parts = std::min(panels, (threads + tiles - 1) / tiles);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tiles * parts; ++task) {
        Tile& tile = own_tile();
        const int64_t start = task / parts * ROWS, count = std::min(ROWS, rows - start), part = task % parts;
        tile.fill(x + start * w.inputs, count, w.inputs);
        for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p)
            panel(w, tile, count, p * PANEL, y + start * w.outputs);
    }
}

#else
extern "C" int level() { return 0; }
#endif
