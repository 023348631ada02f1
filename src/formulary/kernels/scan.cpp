// Gated linear recurrences, S_i = diag(gate_i) S_{i-1} + x_i y_i^T and z_i = S_i^T w_i, forward and backward, with a piece of the
// state in registers over a stretch of tokens. Plain twin: scan.py.
//
// One sweep serves all four: forward (x, y, w, z are key, value, query, output); backward in time over the state's gradient,
// dS_t = a_{t+1} dS_{t+1} + q_t do_t^T, for the values (query, do, key, dv) and, with rows and lanes exchanged, for the keys (do,
// query, value, dk); and, over the states once more, for the queries (value, key, do, dq). Where rows and lanes are exchanged,
// gates belong to lanes. The decays' gradient needs no sweep (arXiv:2312.06635, section 4.3): with
// P_t = sum_v dS_t (a_t S_{t-1}), P_t = P_{t+1} + q_t dq_t - k_t dk_t.
#include "vectors.hpp"

#if defined(__AVX512F__)
constexpr int WIDEST = 4;
#else
constexpr int WIDEST = 1;
#endif
constexpr int64_t ROWS = 4, STEP = 32;  // rows of the state in registers; tokens of a sweep

static inline void copy(const float* from, float* to, int64_t width) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store(to + i, load(from + i));
    for (; i < width; ++i) to[i] = from[i];
}

// (batch, head, token, width) with steps counted in elements; the last is 1. No data: not there.
struct Operand {
    void* data;
    int64_t batch, head, token;
    int32_t half;  // bfloat16 instead of float

    void read(int64_t b, int64_t h, int64_t t, int64_t width, float* to) const {
        const int64_t at = b * batch + h * head + t * token;
        if (!half) return copy(static_cast<const float*>(data) + at, to, width);
        const uint16_t* from = static_cast<const uint16_t*>(data) + at;
        for (int64_t i = 0; i < width; ++i) {
            const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
            std::memcpy(to + i, &bits, 4);
        }
    }

    void prefetch(int64_t b, int64_t h, int64_t t, int64_t width) const {
        const int64_t size = half ? 2 : 4;
        const char* row = static_cast<const char*>(data) + (b * batch + h * head + t * token) * size;
        for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(row + i);
    }

    void write(int64_t b, int64_t h, int64_t t, int64_t width, const float* from) const {
        const int64_t at = b * batch + h * head + t * token;
        if (!half) return copy(from, static_cast<float*>(data) + at, width);
        uint16_t* to = static_cast<uint16_t*>(data) + at;
        for (int64_t i = 0; i < width; ++i) {
            uint32_t bits;
            std::memcpy(&bits, from + i, 4);
            const bool number = from[i] == from[i];
            to[i] = number ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
        }
    }
};

// Rows of floats, mostly one a token. They are an odd number of cache lines long, so that they spread over the sets of the cache.
struct Rows {
    float* data;
    int64_t width, step;

    float* operator[](int64_t i) const { return data + i * step; }
    static int64_t spread(int64_t width) { return (width + 15) / 16 / 2 * 32 + 16; }
};

template <int R, int WIDE, bool LANES>
static inline void tile(const float* x, const float* w, int64_t rows_step, const float* y, int64_t lanes_step, const float* gate,
                        float* state, int64_t state_step, float* z, int64_t tokens) {
    v16 s[R][WIDE];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < WIDE; ++c) s[r][c] = load(state + r * state_step + 16 * c);
    for (int64_t i = 0; i < tokens; ++i) {
        v16 values[WIDE], sum[WIDE];
        for (int c = 0; c < WIDE; ++c) {
            values[c] = load(y + i * lanes_step + 16 * c);
            sum[c] = load(z + i * lanes_step + 16 * c);
        }
        for (int r = 0; r < R; ++r) {
            const float one = x[i * rows_step + r], read = w[i * rows_step + r];
            for (int c = 0; c < WIDE; ++c) {
                const v16 added = one * values[c];
                if (LANES)
                    s[r][c] = load(gate + i * lanes_step + 16 * c) * s[r][c] + added;
                else
                    s[r][c] = gate[i * rows_step + r] * s[r][c] + added;
                sum[c] += read * s[r][c];
            }
        }
        for (int c = 0; c < WIDE; ++c) store(z + i * lanes_step + 16 * c, sum[c]);
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < WIDE; ++c) store(state + r * state_step + 16 * c, s[r][c]);
}

template <int WIDE, bool LANES>
static void strip(const Rows& x, const Rows& w, const Rows& y, const Rows& gate, const Rows& state, const Rows& z, int64_t tokens,
                  int64_t lane) {
    int64_t r = 0;
    for (; r + ROWS <= x.width; r += ROWS)
        tile<ROWS, WIDE, LANES>(x.data + r, w.data + r, x.step, y.data + lane, y.step, gate.data + (LANES ? lane : r),
                                state[r] + lane, state.step, z.data + lane, tokens);
    for (; r < x.width; ++r)
        tile<1, WIDE, LANES>(x.data + r, w.data + r, x.step, y.data + lane, y.step, gate.data + (LANES ? lane : r),
                             state[r] + lane, state.step, z.data + lane, tokens);
}

// Rows x, w (and gates unless LANES) of one width, y, z (and gates if LANES) of another; `state` (rows, lanes) goes on from
// where it is.
template <bool LANES>
static void sweep(const Rows& x, const Rows& w, const Rows& y, const Rows& gate, const Rows& state, const Rows& z,
                  int64_t tokens) {
    std::memset(z.data, 0, tokens * z.step * sizeof(float));
    for (int64_t lane = 0; lane < y.width;) {
        const int64_t left = (y.width - lane + 15) / 16;
        if (left >= WIDEST) {
            strip<WIDEST, LANES>(x, w, y, gate, state, z, tokens, lane);
            lane += 16 * WIDEST;
        } else {
            if (left == 3) strip<3, LANES>(x, w, y, gate, state, z, tokens, lane);
            if (left == 2) strip<2, LANES>(x, w, y, gate, state, z, tokens, lane);
            if (left == 1) strip<1, LANES>(x, w, y, gate, state, z, tokens, lane);
            lane = y.width;
        }
    }
}

struct Sizes {
    int64_t batch, heads, length, keys, values, channels, segment;  // channels: gates a token and head has, 0 (none), 1 or `keys`
};

// What one head works on: zeroed memory from the start of a cache line, handed out in rows.
struct Memory {
    float *start, *free;
    explicit Memory(int64_t floats) : start(static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float)))), free(start) {
        if (start) std::memset(start, 0, floats * sizeof(float));
    }
    ~Memory() { std::free(start); }

    Rows rows(int64_t count, int64_t width) {
        Rows made{free, width, Rows::spread(width)};
        free += count * made.step;
        return made;
    }
};

struct Head {
    const Sizes& size;
    int64_t b, h;

    // Tokens from `first` on, the last one first if `reversed`.
    void fill(const Operand& from, int64_t first, int64_t tokens, bool reversed, const Rows& to) const {
        for (int64_t i = 0; i < tokens; ++i) {
            from.prefetch(b, h, reversed ? first - 1 - i : first + tokens + i, to.width);
            from.read(b, h, reversed ? first + tokens - 1 - i : first + i, to.width, to[i]);
        }
    }

    // exp(log_decay) of the same tokens; reversed, of the token after each.
    void gates(const Operand& decay, int64_t first, int64_t tokens, bool reversed, const Rows& to) const {
        for (int64_t i = 0; i < tokens; ++i) {
            const int64_t t = first + (reversed ? tokens - i : i);
            const bool none = !size.channels || t == size.length;
            float* row = to[i];
            if (!none) decay.prefetch(b, h, reversed ? t - tokens : t + tokens, size.channels);
            if (!none) decay.read(b, h, t, size.channels, row);
            for (int64_t c = 1; c < to.width && !none && size.channels == 1; ++c) row[c] = row[0];
            for (int64_t c = 0; c < to.width; c += 16) store(row + c, none ? all(1.0f) : exponential(load(row + c)));
        }
    }

    float* matrix(float* of, int64_t count = 1, int64_t index = 0) const {
        return of + ((b * size.heads + h) * count + index) * size.keys * size.values;
    }
};

static void copy_in(const float* from, const Rows& to, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to[r], from + r * to.width, to.width * sizeof(float));
}
static void copy_out(const Rows& from, float* to, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * from.width, from[r], from.width * sizeof(float));
}
static void copy_transposed(const float* from, const Rows& to, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < to.width; ++c) to[r][c] = from[c * rows + r];
}

// `io`: query, key, value, log decay (without data: none) and, to be written, the output. `before` and `after` are
// (batch, heads, keys, values); `kept`, if any, takes the states before every `segment` tokens.
extern "C" int scan_forward(const Sizes* sizes, const Operand* io, float* before, float* after, float* kept) {
    const Operand &query = io[0], &key = io[1], &value = io[2], &decay = io[3], &out = io[4];
    const Sizes& size = *sizes;
    const int64_t count = (size.length + size.segment - 1) / size.segment;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed) if (size.batch * size.heads > 1)
    for (int64_t task = 0; task < size.batch * size.heads; ++task) {
        const Head head{size, task / size.heads, task % size.heads};
        Memory memory(3 * STEP * Rows::spread(size.keys) + (2 * STEP + size.keys) * Rows::spread(size.values));
        if (!memory.start) {
            failed = 1;
            continue;
        }
        const Rows q = memory.rows(STEP, size.keys), k = memory.rows(STEP, size.keys), gate = memory.rows(STEP, size.keys);
        const Rows v = memory.rows(STEP, size.values), z = memory.rows(STEP, size.values);
        const Rows state = memory.rows(size.keys, size.values);
        copy_in(head.matrix(before), state, size.keys);
        for (int64_t t = 0; t < size.length; t += STEP) {
            const int64_t tokens = size.length - t < STEP ? size.length - t : STEP;
            if (kept && t % size.segment == 0) copy_out(state, head.matrix(kept, count, t / size.segment), size.keys);
            head.fill(query, t, tokens, false, q);
            head.fill(key, t, tokens, false, k);
            head.fill(value, t, tokens, false, v);
            head.gates(decay, t, tokens, false, gate);
            sweep<false>(k, q, v, gate, state, z, tokens);
            for (int64_t i = 0; i < tokens; ++i) out.write(head.b, head.h, t + i, size.values, z[i]);
        }
        copy_out(state, head.matrix(after), size.keys);
    }
    return failed;
}

// `io`: query, key, value, log decay, the output's gradient and, to be written, the gradients of the first four. `d_after` and
// `d_before` are the gradients of the last state and of the first.
extern "C" int scan_backward(const Sizes* sizes, const Operand* io, float* kept, float* d_after, float* d_before) {
    const Operand &query = io[0], &key = io[1], &value = io[2], &decay = io[3], &d_out = io[4];
    const Operand &d_query = io[5], &d_key = io[6], &d_value = io[7], &d_decay = io[8];
    const Sizes& size = *sizes;
    const int64_t count = (size.length + size.segment - 1) / size.segment, keys = size.keys, values = size.values;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed) if (size.batch * size.heads > 1)
    for (int64_t task = 0; task < size.batch * size.heads; ++task) {
        const Head head{size, task / size.heads, task % size.heads};
        const int64_t wide_keys = Rows::spread(keys), wide_values = Rows::spread(values);
        Memory memory((4 * STEP + size.segment + 1 + 2 * values) * wide_keys + (3 * STEP + keys) * wide_values);
        if (!memory.start) {
            failed = 1;
            continue;
        }
        const Rows q = memory.rows(STEP, keys), k = memory.rows(STEP, keys), dk = memory.rows(STEP, keys);
        const Rows gate = memory.rows(STEP, keys);
        const Rows dq = memory.rows(size.segment, keys), flow = memory.rows(1, keys);  // flow: P_t
        const Rows turned = memory.rows(values, keys), d_turned = memory.rows(values, keys);  // state and gradient, transposed
        const Rows v = memory.rows(STEP, values), d = memory.rows(STEP, values), dv = memory.rows(STEP, values);
        const Rows d_state = memory.rows(keys, values);
        copy_in(head.matrix(d_after), d_state, keys);
        copy_transposed(head.matrix(d_after), d_turned, values);
        for (int64_t n = count - 1; n >= 0; --n) {
            const int64_t start = n * size.segment, end = start + size.segment < size.length ? start + size.segment : size.length;
            copy_transposed(head.matrix(kept, count, n), turned, values);
            for (int64_t t = start; t < end; t += STEP) {
                const int64_t tokens = end - t < STEP ? end - t : STEP;
                head.fill(key, t, tokens, false, k);
                head.fill(value, t, tokens, false, v);
                head.fill(d_out, t, tokens, false, d);
                head.gates(decay, t, tokens, false, gate);
                sweep<true>(v, d, k, gate, turned, Rows{dq[t - start], keys, dq.step}, tokens);
            }
            for (int64_t t = start + (end - start - 1) / STEP * STEP; t >= start; t -= STEP) {
                const int64_t tokens = end - t < STEP ? end - t : STEP;
                head.fill(query, t, tokens, true, q);
                head.fill(key, t, tokens, true, k);
                head.fill(value, t, tokens, true, v);
                head.fill(d_out, t, tokens, true, d);
                head.gates(decay, t, tokens, true, gate);
                if (t + tokens == end) {
                    for (int64_t c = 0; c < keys; ++c) flow[0][c] = 0.0f;
                    for (int64_t r = 0; r < values; ++r)
                        for (int64_t c = 0; c < keys; ++c) flow[0][c] += turned[r][c] * d_turned[r][c];
                    for (int64_t c = 0; c < keys; ++c) flow[0][c] *= gate[0][c];
                }
                sweep<false>(q, k, d, gate, d_state, dv, tokens);
                sweep<true>(d, v, q, gate, d_turned, dk, tokens);
                for (int64_t i = 0; i < tokens; ++i) {
                    const int64_t at = t + tokens - 1 - i;
                    float *of_query = dq[at - start], *p = flow[0];
                    for (int64_t c = 0; c < keys; ++c) p[c] += q[i][c] * of_query[c] - k[i][c] * dk[i][c];
                    d_query.write(head.b, head.h, at, keys, of_query);
                    d_key.write(head.b, head.h, at, keys, dk[i]);
                    d_value.write(head.b, head.h, at, values, dv[i]);
                    if (size.channels == 1) {
                        v16 all_keys = {};
                        for (int64_t c = 0; c < keys; c += 16) all_keys += load(p + c);
                        const float sum = sum_of(all_keys);
                        d_decay.write(head.b, head.h, at, 1, &sum);
                    } else if (size.channels) {
                        d_decay.write(head.b, head.h, at, keys, p);
                    }
                }
            }
        }
        if (size.length) head.gates(decay, 0, 1, false, gate);
        for (int64_t r = 0; r < keys; ++r)
            for (int64_t c = 0; c < values; ++c)
                head.matrix(d_before)[r * values + c] = (size.length ? gate[0][r] : 1.0f) * d_state[r][c];
    }
    return failed;
}
