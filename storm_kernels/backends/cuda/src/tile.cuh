// The forward scan's tile of SCAN_TILE tokens: its inputs prepared in float32, the recurrence
// through it, and its outputs. In shared memory:
//
//     step[token][pair of channels]            log2(e) delta and delta u of either channel: a float4
//     BC[0 is B, 1 is C][token][state]
//     y[pair of tokens][lane of states][pair of channels]
//                                              that lane's parts of y, 2 tokens x 2 channels: a float4
#pragma once
#include "stage.cuh"

// In the elementwise steps (all but the recurrence) a thread owns a quad: QUAD channels beside each
// other, of two neighbouring tokens.
constexpr int QUAD = 4;
constexpr int QUADS = BLOCK_CHANNELS / QUAD;
constexpr int WORKERS = QUADS * SCAN_TILE / 2;  // threads that own a quad
static_assert(WORKERS <= THREADS && SCAN_TILE % 4 == 0, "a tile is one round of the elementwise steps");

// The column of channel pair `p` in a row of `step` or `y`. A thread's two pairs lie apart, so that
// neither the recurrence nor the elementwise steps meet a bank twice. With 16 quads:
//
//     column   0  1  2 ... 15 | 16 17 18 19 | 20 21 22 23 | 24 ... 27 | 28 ... 31
//     pair     0  2  4 ... 30 |  9 11 13 15 |  1  3  5  7 | 25 ... 31 | 17 ... 23
constexpr int PAIRS = 2 * QUADS;
__device__ __forceinline__ int pair_column(int p) { return p % 2 * QUADS + (p / 2 ^ (QUADS >= 8 && p % 2 ? 4 : 0)); }
// Columns of a row of y, padded where lanes beside each other hold other states
constexpr int PART = PAIRS + (CHANNEL_LANES >= 8 ? 0 : CHANNEL_LANES == 4 ? 2 : 1);
constexpr int FLOAT4 = sizeof(float4);
// Parts of y that are loaded before the first one is added: 32 do not fit in registers.
constexpr int PARTS_AT_ONCE = STATE_LANES < 8 ? STATE_LANES : 8;

struct Shared {
    __align__(16) Stage stage[2];
    // 0 past the sequence's end: the states stay as they are
    float4 step[SCAN_TILE][PAIRS];
    __align__(16) float BC[2][SCAN_TILE][STATES];
    // `OpenCells::add_each` puts the finished y in place of lane 0's parts
    float4 y[SCAN_TILE / 2][STATE_LANES][PART];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "scan.py counts the same");

// A thread's quad and where it lies.
struct Quad {
    // Its first channel within the block, its first token within the tile, and how many of its
    // channels exist. A thread that owns no quad has none, and the place of another thread's quad.
    int channel, token, channels;
    float bias[QUAD], skip[QUAD];      // delta_bias and D of the channels, 0 where there is none
    // Offsets in bytes: in the stage's arrays, were their numbers of two bytes; in step and in y, of
    // either pair; in BC
    int staged, step[2], part[2], BC;
    int first_valid;                   // `token` if a channel exists, else past every tile

    __device__ __forceinline__ Quad(const Direction& d, const Share& s) {
        channel = threadIdx.x % QUADS * QUAD;
        token = threadIdx.x % WORKERS / QUADS * 2;
        channels = idle() ? 0 : s.channels - channel;
#pragma unroll
        for (int c = 0; c < QUAD; c++) {
            bias[c] = c < channels && d.delta_bias ? d.delta_bias[s.channel + channel + c] : 0.0f;
            skip[c] = c < channels && d.D ? d.D[s.channel + channel + c] : 0.0f;
        }
        staged = pinned((token * BLOCK_CHANNELS + channel) * 2);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int own = pair_column(threadIdx.x % QUADS * 2 + k);
            step[k] = pinned((token * PAIRS + own) * FLOAT4);
            part[k] = pinned((token / 2 * STATE_LANES * PART + own) * FLOAT4);
        }
        first_valid = pinned(channels > 0 ? token : SCAN_TILE);
        BC = pinned((int)threadIdx.x * 16);
    }
    // Whether the thread owns no quad: it may read another thread's, but writes nothing.
    __device__ __forceinline__ static bool idle() { return WORKERS < THREADS && threadIdx.x >= WORKERS; }
    template <typename T>
    __device__ __forceinline__ void load(float (&v)[QUAD], const T (&rows)[SCAN_TILE][BLOCK_CHANNELS], int j) const {
        load_quad(v, past(&rows[j][0], staged * (int)sizeof(T) / 2));
    }
};

// From the stage to `step` and `BC`; u stays with the thread that needs it for D u.
__device__ __forceinline__ void prepare(Shared& shared, const Stage& stage, const Quad& at, float (&u)[2][QUAD]) {
    if (!at.idle()) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float delta[QUAD];
            at.load(delta, stage.delta, j);
            at.load(u[j], stage.u, j);
#pragma unroll
            for (int c = 0; c < QUAD; c++) {
                delta[c] += at.bias[c];
                if (SOFTPLUS) delta[c] = softplus(delta[c]);
            }
#pragma unroll
            for (int k = 0; k < 2; k++)
                *past(&shared.step[j][0], at.step[k]) = make_float4(LOG2E * delta[2 * k],
                    delta[2 * k] * u[j][2 * k], LOG2E * delta[2 * k + 1], delta[2 * k + 1] * u[j][2 * k + 1]);
        }
    }
    constexpr int EACH = SCAN_TILE * STATES / QUAD;
#pragma unroll
    for (int k = 0; k < (2 * EACH + THREADS - 1) / THREADS; k++) {
        const int i = threadIdx.x + k * THREADS;
        if (2 * EACH % THREADS != 0 && i >= 2 * EACH) break;
        float v[QUAD];
        if constexpr (C_AFTER_B == sizeof(stage.B) && sizeof(stage.B) == sizeof(stage.C) && alike(B_T(), C_T())) {
            load_quad(v, past(&stage.B[0][0], at.BC * (int)sizeof(B_T) / 4) + k * THREADS * QUAD);
        } else {
            if (i < EACH)
                load_quad(v, &stage.B[0][0] + QUAD * i);
            else
                load_quad(v, &stage.C[0][0] + QUAD * (i - EACH));
        }
        store_quad(v, past(&shared.BC[0][0][0], at.BC) + k * THREADS * QUAD);
    }
}

// Of the tile only the first `tokens` exist: nothing happens to the states at the others.
__device__ __forceinline__ void stand_still(Shared& shared, const Quad& at, int tokens) {
    if (at.idle()) return;
#pragma unroll
    for (int j = 0; j < 2; j++)
        if (at.token + j >= tokens)
            *past(&shared.step[j][0], at.step[0]) = *past(&shared.step[j][0], at.step[1]) =
                make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// Where the channels and states that a thread takes through the recurrence lie in `step`, `BC` and
// `y`, in bytes.
struct Lane {
    int step, state, part;

    __device__ __forceinline__ explicit Lane(const Place& at) {
        const int own = pair_column(at.channel / PAIR);
        step = pinned(own * FLOAT4);
        state = pinned(at.state * (int)sizeof(float));
        part = pinned((at.state / LANE_STATES * PART + own) * FLOAT4);
    }
};

// One token for this thread's states: h = exp(delta A) h + delta u B. With OUTPUT it returns the
// thread's part of y = h . C for its two channels.
template <bool OUTPUT>
__device__ __forceinline__ float2 advance(
    float (&h)[ITEMS], const float (&A)[ITEMS], const Shared& shared, int t, const Lane& lane) {
    const float4 step = *past(&shared.step[t][0], lane.step);
    float B[LANE_STATES], C[LANE_STATES], y[PAIR] = {0.0f, 0.0f};
    load_run(B, past(&shared.BC[0][t][0], lane.state));
    if (OUTPUT) load_run(C, past(&shared.BC[1][t][0], lane.state));
#pragma unroll
    for (int c = 0; c < PAIR; c++) {
        const float rate = c ? step.z : step.x, input = c ? step.w : step.y;
#pragma unroll
        for (int n = 0; n < LANE_STATES; n++) {
            const int i = c * LANE_STATES + n;
            h[i] = fmaf(exp2_fast(rate * A[i]), h[i], input * B[n]);
            if (OUTPUT) y[c] = n ? fmaf(h[i], C[n], y[c]) : h[i] * C[n];
        }
    }
    return make_float2(y[0], y[1]);
}
template <bool OUTPUT, int UNROLL>
__device__ __forceinline__ void advance_tile(
    float (&h)[ITEMS], const float (&A)[ITEMS], Shared& shared, const Lane& lane) {
#pragma unroll UNROLL
    for (int t = 0; t < SCAN_TILE; t += 2) {
        const float2 first = advance<OUTPUT>(h, A, shared, t, lane),
                     second = advance<OUTPUT>(h, A, shared, t + 1, lane);
        if (OUTPUT) *past(&shared.y[t / 2][0][0], lane.part) = make_float4(first.x, first.y, second.x, second.y);
    }
}

// y before the gate: the sum of its parts and D u.
__device__ __forceinline__ void finish(
    float (&y)[2][QUAD], const Shared& shared, const float (&u)[2][QUAD], const Quad& at) {
#pragma unroll
    for (int c = 0; c < QUAD; c++)
#pragma unroll
        for (int j = 0; j < 2; j++) y[j][c] = at.skip[c] * u[j][c];
#pragma unroll PARTS_AT_ONCE
    for (int lane = 0; lane < STATE_LANES; lane++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float4 part = *past(&shared.y[0][lane][0], at.part[k]);
            y[0][2 * k] += part.x;
            y[0][2 * k + 1] += part.y;
            y[1][2 * k] += part.z;
            y[1][2 * k + 1] += part.w;
        }
}
__device__ __forceinline__ void gate(float (&y)[2][QUAD], const Stage& stage, const Quad& at) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float z[QUAD];
        at.load(z, stage.z, j);
#pragma unroll
        for (int c = 0; c < QUAD; c++) y[j][c] *= z[c] * sigmoid(z[c]);
    }
}

// Where a thread writes its quads in an array (batch, length, channels).
template <typename T>
struct OutputRows {
    T* to;            // the quad's first channel in the row of its first token
    int64 row, step;  // elements to the next token's row in scan order; bytes to the next tile's

    __device__ __forceinline__ OutputRows(T* out, const Problem& p, const Share& s, const Quad& at) {
        row = s.reverse ? -p.channels : p.channels;
        step = pinned(row * SCAN_TILE * (int64)sizeof(T));
        to = nullptr;
        if (out) seek(out + (s.batch * p.length + s.token(0)) * p.channels, s, at);
    }
    // `first` is the row of the tile's first token.
    __device__ __forceinline__ void seek(T* first, const Share& s, const Quad& at) {
        to = first + at.token * row + s.channel + at.channel;
    }
    __device__ __forceinline__ void write(const float (&y)[2][QUAD], const Quad& at) {
        if (ASYNC && at.first_valid < SCAN_TILE) {
            store_quad(y[0], to);
            store_quad(y[1], to + row);
        }
        if (!ASYNC) write_first(y, at, SCAN_TILE);
    }
    __device__ __forceinline__ void next_tile() { to = (T*)((char*)to + step); }
    __device__ __forceinline__ void write_first(const float (&y)[2][QUAD], const Quad& at, int tokens) {
        for (int j = 0; j < 2; j++)
            for (int c = 0; c < QUAD; c++)
                if (at.token + j < tokens && c < at.channels) from_float(y[j][c], to[j * row + c]);
    }
};
