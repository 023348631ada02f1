// The linear map of int4.hpp for a matrix of rows, and its packing. Plain twin: int4.py.
#include "int4.hpp"

#ifdef HAS_INT8
using namespace formulary;

extern "C" int level() { return 1; }

// codes (outputs, deep) from 0 to 15, scales and zeros (outputs, groups), scales in units of w.scale -> w.packed, zero before.
extern "C" void pack(const Linear4* weights, const uint8_t* codes, const float* scales, const uint8_t* zeros) {
    const Linear4& w = *weights;
    const int64_t groups = w.deep / w.group;
#pragma omp parallel for schedule(static) if (w.outputs * w.deep > 65536)
    for (int64_t n = 0; n < w.outputs; ++n)
        for (int64_t g = 0; g < groups; ++g) {
            uint8_t *to = const_cast<uint8_t*>(w.packed) + (n / 16 * groups + g) * w.bytes(), *tail = to + 8 * w.group;
            const uint8_t* from = codes + n * w.deep + g * w.group;
            for (int64_t k = 0; k < w.group; ++k) to[k / 8 * 64 + n % 16 * 4 + k % 4] |= from[k] << (k & 4);
            const uint16_t half = _cvtss_sh(scales[n * groups + g], _MM_FROUND_TO_NEAREST_INT);
            std::memcpy(tail + 2 * (n % 16), &half, 2);
            tail[32 + n % 16] = zeros[n * groups + g];
        }
}

// x (rows, inputs) -> y (rows, outputs)
extern "C" void linear(const Linear4* weights, const float* x, int64_t rows, float* y) {
    const Linear4& w = *weights;
#pragma omp parallel if (rows > ROWS)
    {
        thread_local Rows4 some;
#pragma omp for schedule(static)
        for (int64_t start = 0; start < rows; start += ROWS) {
            const int64_t count = std::min(ROWS, rows - start);
            some.start(w);
            for (int64_t r = 0; r < count; ++r) some.quantize(r, x + (start + r) * w.inputs, w);
            multiply(w, some, count, false, [&](int64_t r, int64_t n, const __m512* out) {
                put(y + (start + r) * w.outputs, n, w.outputs, out);
            });
        }
    }
}

#else
extern "C" int level() { return 0; }
#endif
