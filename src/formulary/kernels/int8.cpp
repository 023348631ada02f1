// The linear map of int8.hpp for a matrix of rows, and its packing. Plain twin: int8.py.
#include "int8.hpp"

#ifdef HAS_INT8
using namespace formulary;

// 0: none, 1: VNNI, 2: AMX, which the system must grant to the process first.
extern "C" int level() {
#ifdef HAS_AMX
    constexpr long ask = 0x1023, tiles = 18;
    if (syscall(SYS_arch_prctl, ask, tiles) == 0) return 2;
#endif
    return 1;
}

// codes (outputs, inputs) -> packed (wide / 16, deep / 4, 16, 4) and sums (wide), both zero before.
extern "C" void pack(const int8_t* codes, int64_t outputs, int64_t inputs, int64_t deep, int8_t* packed, int32_t* sums) {
#pragma omp parallel for schedule(static) if (outputs * inputs > 65536)
    for (int64_t n = 0; n < outputs; ++n) {
        int8_t* to = packed + n / 16 * 16 * deep + n % 16 * 4;
        int32_t sum = 0;
        for (int64_t k = 0; k < inputs; ++k) {
            const int8_t code = codes[n * inputs + k];
            to[k / 4 * 64 + k % 4] = code;
            sum += code;
        }
        sums[n] = 128 * sum;
    }
}

// x (rows, inputs) -> y (rows, outputs)
extern "C" void linear(const Linear* weights, const float* x, int64_t rows, int32_t level, float* y) {
    const Linear& w = *weights;
#pragma omp parallel if (rows > ROWS)
    {
        const Tiles tiles(level == 2 && rows > FEW);
        thread_local Rows some;
#pragma omp for schedule(static)
        for (int64_t start = 0; start < rows; start += ROWS) {
            const int64_t count = std::min(ROWS, rows - start);
            some.start(w);
            for (int64_t r = 0; r < count; ++r) some.quantize(r, x + (start + r) * w.inputs, w);
            multiply(w, some, count, level == 2, [&](int64_t r, int64_t n, const __m512* out) {
                put(y + (start + r) * w.outputs, n, w.outputs, out);
            });
        }
    }
}

#else
extern "C" int level() { return 0; }
#endif
