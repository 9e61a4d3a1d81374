// What surrounds the adjoint in the scan's backward: the elementwise strides, and the sums over
// states and channels.
#pragma once
#include "backward.cuh"

// A lane's elements: its pair of channels, of every BATCH-th token. The lane counts tokens `t` from
// its first one of the interval.
struct Elements {
    // The first token; the pair's first channel within the block; how many of the pair exist
    int token, channel, channels;
    int limit[PAIR];                 // tokens of the present interval that exist; 0 for a channel that does not
    Column<GY_T> gy;                 // of the next batch
    Column<U_T> u, du;               // of the present batch
    Column<DELTA_T> delta, ddelta;

    __device__ __forceinline__ Elements(const BackwardArgs& a, const Direction& d, const Gradients& grad,
        const Share& s, const Place& at, int64 begin) {
        channel = at.channel;
        token = at.lane / CHANNEL_LANES;
        channels = (int)smaller(PAIR, s.channels - channel);
        const int64 e = s.channel + channel, l = s.token(begin + token), row = a.p.channels;
        u = column(d.u, s.batch * d.u_batch + l * d.u_row + e);
        delta = column(d.delta, s.batch * d.delta_batch + l * d.delta_row + e);
        du = column(grad.u, (s.batch * a.p.length + l) * row + e);
        ddelta = column(grad.delta, (s.batch * a.p.length + l) * row + e);
        gy = column(a.gy, s.batch * a.gy_batch + l * a.gy_row + e * a.gy_channel, a.gy_channel);
    }
    __device__ __forceinline__ void set_limit(int left) {
#pragma unroll
        for (int c = 0; c < PAIR; c++) limit[c] = c < channels && left > token ? left - token : 0;
    }
    // How many channels the lane has of token `t`; none of one before the interval.
    __device__ __forceinline__ int count(int t) const {
        return PAIRED ? ((uint32)t < (uint32)limit[0] ? PAIR : 0)
                      : ((uint32)t < (uint32)limit[0]) + ((uint32)t < (uint32)limit[1]);
    }
    __device__ __forceinline__ void to_last_batch(const Strides& strides, int back) {
        u.move(back * strides.u);
        delta.move(back * strides.delta);
        du.move(back * strides.du);
        ddelta.move(back * strides.ddelta);
    }
};

// log2(e) delta and delta u of an interval; each warp prepares its own channels'. The present batch
// is `batches` after the interval's first.
__device__ __forceinline__ void prepare_steps(
    Shared& shared, const Elements& e, const Offsets& at, const Strides& strides, int batches) {
    Column<U_T> us = e.u;
    Column<DELTA_T> deltas = e.delta;
    const float2 bias = load_pair(past(shared.terms, TOGETHER ? at.pair : at.pair / 2));
    us.move(-batches * strides.u);
    deltas.move(-batches * strides.delta);
#pragma unroll 4
    for (int k = 0; k < (INTERVAL + STATE_LANES - 1) / STATE_LANES; k++) {
        const int t = k * STATE_LANES;
        if (INTERVAL % STATE_LANES != 0 && e.token + t >= INTERVAL) break;
        const float2 u = unpacked(us.read(e.count(t)));
        float2 delta = unpacked(deltas.read(e.count(t), no_delta()));
        delta = make_float2(delta.x + bias.x, delta.y + bias.y);
        if (SOFTPLUS) delta = make_float2(softplus(delta.x), softplus(delta.y));
        if (!SOFTPLUS && t >= e.limit[0]) delta.x = 0.0f;
        if (!SOFTPLUS && t >= e.limit[1]) delta.y = 0.0f;
        *(float4*)past(shared.step[t], at.step) =
            make_float4(LOG2E * delta.x, LOG2E * delta.y, delta.x * u.x, delta.y * u.y);
        us.move(STATE_LANES / BATCH * strides.u);
        deltas.move(STATE_LANES / BATCH * strides.delta);
    }
}

// B or C of the tile that begins at position `begin`, of which `tokens` exist. `rows` is the row of
// position 0; rows lie `step` bytes apart.
template <typename T>
__device__ __forceinline__ void prepare_rows(
    float (&to)[BC_TILE][STATES], const T* rows, int64 step, int64 begin, int tokens) {
    constexpr int WIDTH = STATES % 2 ? 1 : 2, AT_ONCE = THREADS * WIDTH;
    // Tokens at once; pieces of a token
    constexpr int TOKENS = AT_ONCE > STATES ? AT_ONCE / STATES : 1, PIECES = STATES > AT_ONCE ? STATES / AT_ONCE : 1;
    const int first = threadIdx.x * WIDTH / STATES, n = threadIdx.x * WIDTH % STATES;
    Column<T> from = column(rows, n);
    from.move((begin + first) * step);
#pragma unroll
    for (int k = 0; k < (BC_TILE + TOKENS - 1) / TOKENS; k++) {
        const int t = first + k * TOKENS;
        if (BC_TILE % TOKENS != 0 && t >= BC_TILE) break;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const float2 x = unpacked(from.read(t < tokens ? D_STATE - n - i * AT_ONCE : 0));
            if (WIDTH == 2)
                *(float2*)&to[t][n + i * AT_ONCE] = x;
            else
                to[t][n] = x.x;
            if (PIECES > 1) from.move(AT_ONCE * sizeof(T));
        }
        from.move(TOKENS * step - (PIECES > 1 ? STATES * (int64)sizeof(T) : 0));
    }
}

__device__ __forceinline__ void prepare_states(Shared& shared, const Strides& strides, const Share& s, int64 first) {
    const int tokens = (int)smaller(BC_TILE, s.length - first);
    prepare_rows(shared.B, shared.B_rows, strides.B, first, tokens);
    prepare_rows(shared.C, shared.C_rows, strides.C, first, tokens);
}

// A thread's sums of dA over all intervals, in device memory for want of registers, each with its
// rounding error as in `Sum`. Each is RUN floats a thread beside each other:
//
//     ITEMS / RUN rows of sums, then as many of errors    | thread 0 | thread 1 | ...
struct SumsOfA {
    float* memory;

    __device__ __forceinline__ SumsOfA(const BackwardArgs& a, int64 block)
        : memory(a.dA_sums + block * 2 * ITEMS * THREADS + threadIdx.x * RUN) {}
    __device__ __forceinline__ float& value(int i) const { return memory[i / RUN * RUN * THREADS + i % RUN]; }
    __device__ __forceinline__ float& lost(int i) const { return memory[(ITEMS + i / RUN * RUN) * THREADS + i % RUN]; }
    __device__ __forceinline__ void clear() const {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) value(i) = lost(i) = 0.0f;
    }
    __device__ __forceinline__ void load(float (&values)[ITEMS], float (&errors)[ITEMS]) const {
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            load_floats(values, r * RUN, memory + r * RUN * THREADS);
            load_floats(errors, r * RUN, memory + (ITEMS + r * RUN) * THREADS);
        }
    }
    __device__ __forceinline__ void store(const float (&values)[ITEMS], const float (&errors)[ITEMS]) const {
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            store_floats(memory + r * RUN * THREADS, values, r * RUN);
            store_floats(memory + (ITEMS + r * RUN) * THREADS, errors, r * RUN);
        }
    }
};

// Adds the lanes' sums of dD and d(delta_bias) over a warp and writes them.
__device__ __forceinline__ void write_row_gradients(
    const Shared& shared, const Gradients& grad, const Elements& e, const Problem& p, const Share& s) {
#pragma unroll
    for (int c = 0; c < PAIR; c++) {
        const int64 row = s.sequence * p.channels + s.channel + e.channel + c;
        float D = shared.dD[c][threadIdx.x].value, bias = shared.dbias[c][threadIdx.x].value;
#pragma unroll
        for (int bit = CHANNEL_LANES; bit < 32; bit *= 2) {
            D += __shfl_xor_sync(0xffffffffu, D, bit);
            bias += __shfl_xor_sync(0xffffffffu, bias, bit);
        }
        if (e.token == 0 && c < e.channels && grad.D) grad.D[row] = D;
        if (e.token == 0 && c < e.channels && grad.delta_bias) grad.delta_bias[row] = bias;
    }
}

// What a lane reads of its element of a batch: before the adjoint and after it.
struct Element {
    Two<GY_T> gy;
    Two<U_T> u;
    Two<DELTA_T> delta;

    __device__ __forceinline__ void request_gradient(const Elements& e, int t) { gy = e.gy.read(e.count(t)); }
    __device__ __forceinline__ void request_inputs(const Elements& e, int t) {
        u = e.u.read(e.count(t));
        delta = e.delta.read(e.count(t), no_delta());
    }
};

// Writes the gradients of u and delta of an element, and adds to those of D and the bias.
__device__ __forceinline__ void write_gradients(
    Shared& shared, const Elements& e, const Element& x, const Offsets& at, int t) {
    const int count = e.count(t);
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < STATE_LANES; j++) {
        const float4 part = *(const float4*)past(shared.channel[0][j * CHANNEL_LANES], at.element);
        sums = j ? make_float4(sums.x + part.x, sums.y + part.y, sums.z + part.z, sums.w + part.w) : part;
    }
    const float2 u = unpacked(x.u), raw = unpacked(x.delta), gy = load_pair(past(shared.gy[0], at.step / 2));
    const float2 bias = load_pair(past(shared.terms, TOGETHER ? at.pair : at.pair / 2)),
                 skip = load_pair(past(shared.terms + term_at(1, 0), TOGETHER ? at.pair : at.pair / 2));
    const float2 rate = *(const float2*)past(shared.step[t], at.step),
                 delta = make_float2(rate.x * LN2, rate.y * LN2);
    float2 ddelta = make_float2(fmaf(sums.x, u.x, sums.z), fmaf(sums.y, u.y, sums.w));
    if (SOFTPLUS) ddelta = make_float2(ddelta.x * sigmoid(raw.x + bias.x), ddelta.y * sigmoid(raw.y + bias.y));
    float4& rows = *(float4*)past(shared.row_sums[0], at.own);
    if (!SOFTPLUS && count < 1) ddelta.x = 0.0f;
    if (!SOFTPLUS && count < 2) ddelta.y = 0.0f;
    rows = make_float4(fmaf(gy.x, u.x, rows.x), fmaf(gy.y, u.y, rows.y), rows.z + ddelta.x, rows.w + ddelta.y);
    e.du.write(make_float2(fmaf(sums.x, delta.x, skip.x * gy.x), fmaf(sums.y, delta.y, skip.y * gy.y)), count);
    e.ddelta.write(ddelta, count);
}

// Adds the lanes' parts of a batch's dB and dC over the warp's channels. `first` is the batch's first
// token within the segment.
__device__ __forceinline__ void add_channels(Shared& shared, const Offsets& at, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < (OUTPUTS + 31) / 32; k++) {
        float sum[RUN], part[RUN];
        load_floats(sum, 0, past(&shared.warp[0].state[0][32 * k * RUN], at.output));
#pragma unroll
        for (int j = 1; j < PARTS; j++) {
            load_floats(part, 0, past(&shared.warp[0].state[j][32 * k * RUN], at.output));
#pragma unroll
            for (int i = 0; i < RUN; i++) sum[i] += part[i];
        }
#pragma unroll
        for (int bit = OUTPUTS; bit < 32; bit *= 2)
#pragma unroll
            for (int i = 0; i < RUN; i++) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], bit);
        constexpr int MORE = 32 / STATE_LANES;  // runs from one output of a lane to its next
        float* to = &shared.warp[0].BC[first + k * MORE / RUNS]
                                      [k * MORE % RUNS / (RUNS / 2) * STATES + k * MORE % (RUNS / 2) * RUN];
        if (lane < LIVE) store_floats(past(to, at.sum), sum, 0);
    }
}

// Adds a segment's dB and dC over the warps and writes those of its first `left` tokens. `to` is
// where the thread's first piece goes; tokens lie `row` floats apart.
__device__ __forceinline__ void write_states(const Shared& shared, const Offsets& at, float* to, int64 row, int left) {
    constexpr int AT_ONCE = THREADS * PIECE;
#pragma unroll
    for (int k = 0; k < (SEGMENT_FLOATS + AT_ONCE - 1) / AT_ONCE; k++) {
        const int t = threadIdx.x * PIECE / (2 * STATES) + k * AT_ONCE / (2 * STATES), n = threadIdx.x * PIECE % STATES;
        if ((SEGMENT_FLOATS % AT_ONCE != 0 && t >= SEGMENT) || t >= left) break;
        float sum[PIECE], part[PIECE];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            load_floats<PIECE>(part, 0, past(&shared.warp[w].BC[0][0] + k * AT_ONCE, at.own / (4 / PIECE)));
#pragma unroll
            for (int j = 0; j < PIECE; j++) sum[j] = w ? sum[j] + part[j] : part[j];
        }
        float* out = to + k * AT_ONCE / (2 * STATES) * row + k * AT_ONCE / STATES % 2 * D_STATE;
        if (D_STATE == STATES) {
            store_floats<PIECE>(out, sum, 0);
        } else {
#pragma unroll
            for (int j = 0; j < PIECE; j++)
                if (n + j < D_STATE) out[j] = sum[j];
        }
    }
}
