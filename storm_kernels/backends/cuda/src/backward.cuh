// What the scan's backward is built of: arguments, shared memory, and how a lane finds its share of
// arrays there and in device memory.
//
// The launch code (scan_backward.py) defines, besides scan.cuh's names: GY_T (number format of
// dL/dy); SOFTPLUS; PAIRED: channels come in aligned pairs, and states too; BC_TILE: tokens whose B
// and C are prepared together, SEGMENT or INTERVAL; BATCH: tokens whose elementwise steps are done
// together, at most STATE_LANES. With BC_TILE = INTERVAL and two batches a segment:
//
//     | BC_TILE: one interval                                    |
//     | segment     | segment     | segment     | segment        |
//     | batch batch | batch batch | batch batch | ...
//
// An element is a lane's part of a batch: one token and one pair of channels.
#pragma once
#include "scan.cuh"

struct Gradients {
    U_T* u;             // (batch, length, channels)
    DELTA_T* delta;     // (batch, length, channels)
    float* BC;          // (group_blocks, batch * length, groups, 2, D_STATE): dB, then dC, of one block's channels
    float* A;           // (sequences, channels, D_STATE): of one sequence, as D and delta_bias
    float* D;           // (sequences, channels)
    float* delta_bias;  // (sequences, channels)
};

// Bytes from a batch to the next in scan order, but of B, C and BC.
struct Strides {
    int64 B;   // from a token to the next
    int64 C;   // from a token to the next
    int64 u;
    int64 delta;
    int64 du;
    int64 ddelta;
    int64 gy;
    int64 BC;  // from a segment to the next
};

struct BackwardArgs {
    Direction direction[2];
    Gradients gradients[2];
    Strides strides[2];
    Problem p;
    int64 blocks;
    int64 groups;
    float* dA_sums;     // (blocks of threads, 2, ITEMS, THREADS): each thread's sums and their rounding errors
    const GY_T* gy;     // (batch, length, channels): dL/dy, the same for two directions; any strides
    int64 gy_batch;
    int64 gy_row;
    int64 gy_channel;
    const float* grad_final_state;
    float* grad_initial_state;
};

constexpr float LN2 = 0.6931471805599453f;
constexpr int SEGMENTS = INTERVAL / SEGMENT;
constexpr int RUN = LANE_STATES < 4 ? LANE_STATES : 4;  // floats moved at once
constexpr int RUNS = 2 * LANE_STATES / RUN;             // of a lane's dB and dC of a token
constexpr int SEGMENT_FLOATS = SEGMENT * 2 * STATES;    // of a segment's dB and dC
// Of these a thread writes so many at once:
constexpr int PIECE =
    SEGMENT_FLOATS / THREADS < 1 ? 1 : SEGMENT_FLOATS / THREADS < RUN ? SEGMENT_FLOATS / THREADS : RUN;
constexpr int OUTPUTS = BATCH * RUNS * STATE_LANES;     // runs of a warp's dB and dC in a batch
// Lanes take an output each. Where outputs are fewer than lanes, LIVE of them, the 32 / LIVE lanes of
// one output take PARTS of its parts each.
constexpr int LIVE = OUTPUTS < 32 ? OUTPUTS : 32;
constexpr int PARTS = CHANNEL_LANES * LIVE / 32 > 1 ? CHANNEL_LANES * LIVE / 32 : 1;
// Floats of a lane's row in `WarpSums`, padded: lanes write the parts of one output without a bank
// conflict
constexpr int ROW = OUTPUTS * RUN + (RUN == 4 ? RUN : 1);

// A warp's sums of dB and dC:
//
//     state[lane of channels]   token of the batch | run: dB, then dC | lane of states   RUN floats each
//     BC[token of the segment]  dB of all states | dC of all states    summed over the warp's channels
//
// Where a lane has one run of each, an output's first part lies as far from the beginning of `state`
// as its sum lies from the beginning of `BC`.
struct WarpSums {
    __align__(16) float state[CHANNEL_LANES][ROW];
    __align__(16) float BC[SEGMENT][2 * STATES];
};

// Whether a pair's biases and Ds lie beside each other, for one load. On sm_100 that load spills a
// register.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool TOGETHER = false;
#else
constexpr bool TOGETHER = true;
#endif
// Where channel `c` has its bias (term 0) or its D (term 1).
__device__ __forceinline__ int term_at(int term, int c) {
    return TOGETHER ? c / PAIR * 2 * PAIR + term * PAIR + c % PAIR : term * BLOCK_CHANNELS + c;
}

struct Shared {
    // States before each segment of an interval; a thread reads only what it wrote
    __align__(16) float saved[SEGMENTS][RUNS][THREADS][RUN];
    __align__(16) float4 step[INTERVAL][BLOCK_CHANNELS / PAIR];  // a pair's two log2(e) delta, then its two delta u
    __align__(16) float B[BC_TILE][STATES];
    __align__(16) float C[BC_TILE][STATES];
    __align__(16) float channel[BATCH][THREADS][2 * PAIR];     // each lane's part of g . B and (g a h_{l-1}) . A
    __align__(16) WarpSums warp[WARPS];
    __align__(16) float gy[BATCH][BLOCK_CHANNELS];             // dL/dy
    __align__(16) float terms[2 * BLOCK_CHANNELS];             // each channel's bias and D, at `term_at`
    __align__(16) float row_sums[THREADS][2 * PAIR];           // of an interval: each lane's dD and d(delta_bias)
    Sum dD[PAIR][THREADS];                                     // of all intervals so far
    Sum dbias[PAIR][THREADS];
    __align__(16) const B_T* B_rows;                           // the row of position 0; here for want of registers
    const C_T* C_rows;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "scan_backward.py counts the same");
static_assert(BATCH <= STATE_LANES && SEGMENT % BATCH == 0, "a lane has one element of a batch");

template <int WIDTH = RUN, int N>
__device__ __forceinline__ void store_floats(float* to, const float (&v)[N], int first) {
    if (WIDTH == 4) *(float4*)to = make_float4(v[first], v[first + 1], v[first + 2], v[first + 3]);
    if (WIDTH == 2) *(float2*)to = make_float2(v[first], v[first + 1]);
    if (WIDTH == 1) to[0] = v[first];
}
template <int WIDTH = RUN, int N>
__device__ __forceinline__ void load_floats(float (&v)[N], int first, const float* from) {
    if (WIDTH == 4) {
        const float4 four = *(const float4*)from;
        v[first] = four.x, v[first + 1] = four.y, v[first + 2] = four.z, v[first + 3] = four.w;
    }
    if (WIDTH == 2) {
        const float2 two = *(const float2*)from;
        v[first] = two.x, v[first + 1] = two.y;
    }
    if (WIDTH == 1) v[first] = from[0];
}

// A thread's states in a checkpoint whose row 0 is its first channel; zero where there are none.
__device__ __forceinline__ void load_checkpoint(float (&v)[ITEMS], const float* from, int state, int channels) {
    if (D_STATE != STATES) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int c = i / LANE_STATES, n = state + i % LANE_STATES;
            v[i] = c < channels && n < D_STATE ? from[c * D_STATE + n] : 0.0f;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) v[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < RUNS; r++)
        if (r * RUN / LANE_STATES < channels)
            load_floats(v, r * RUN, from + r * RUN / LANE_STATES * D_STATE + state + r * RUN % LANE_STATES);
}

// A pair as it comes from memory: unpacked when it is used, so that nothing waits for it before.
template <typename T>
struct Two {
    uint32 bits = 0;
    __device__ __forceinline__ void set(T first, T second) { bits = first.bits | (uint32)second.bits << 16; }
    __device__ __forceinline__ T first() const { return T{(unsigned short)bits}; }
};
template <>
struct Two<float> {
    float2 value = {0.0f, 0.0f};
    __device__ __forceinline__ void set(float first, float second) { value = make_float2(first, second); }
    __device__ __forceinline__ float first() const { return value.x; }
};
__device__ __forceinline__ float2 unpacked(Two<float> x) { return x.value; }
__device__ __forceinline__ float2 unpacked(Two<bf16> x) {
    return make_float2(bits_to_float(x.bits << 16), bits_to_float(x.bits & 0xffff0000u));
}
__device__ __forceinline__ float2 unpacked(Two<fp16> x) {
    return make_float2(to_float(fp16{(unsigned short)x.bits}), to_float(fp16{(unsigned short)(x.bits >> 16)}));
}

// delta before the bias where there is no token or channel: softplus and sigmoid make 0 of it.
__device__ __forceinline__ Two<DELTA_T> no_delta() {
    Two<DELTA_T> x;
    DELTA_T none = DELTA_T();
    if (SOFTPLUS) from_float(-60000.0f, none);
    x.set(none, none);
    return x;
}

// Where a lane's share lies within the arrays of `Shared`, in bytes.
struct Offsets {
    uint32 pair;      // its channels, where a pair has 16 bytes
    uint32 states;    // its states, 4 bytes each
    uint32 own;       // what is the thread's own, where a thread has 16 bytes
    uint32 part;      // its parts of dB and dC
    uint32 element;   // the first part of its element of a batch, 16 bytes each
    uint32 output;    // the first part of the run of dB or dC that it adds up
    uint32 sum;       // where that sum goes; `output` where a lane's dB and dC are a run each
    uint32 step;      // its element, where a pair has 16 bytes; not pinned: one register more spills on sm_100

    __device__ __forceinline__ Offsets(const Place& at) {
        const uint32 warp = threadIdx.x / 32, lane = at.lane;
        pair = pinned((uint32)at.channel * 8);
        states = pinned((uint32)at.state * 4);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
        // NVRTC 13.0, of torch 2.12 to 2.14, spills 16 bytes any other way
        own = sizeof(U_T) < 4 ? threadIdx.x * 16 : pinned(threadIdx.x * 16);
#else
        own = pinned(threadIdx.x * 16);
#endif
        part = pinned(warp * (uint32)sizeof(WarpSums) + (lane % CHANNEL_LANES * ROW + lane / CHANNEL_LANES * RUN) * 4);
        element = pinned((lane / CHANNEL_LANES * THREADS + warp * 32 + lane % CHANNEL_LANES) * 16);
        output = pinned(warp * (uint32)sizeof(WarpSums) + (lane / LIVE * PARTS * ROW + lane % LIVE * RUN) * 4);
        const uint32 run = lane % LIVE / STATE_LANES, n = lane % STATE_LANES * LANE_STATES + run % (RUNS / 2) * RUN;
        sum = output;
        if (RUNS > 2)
            sum = warp * (uint32)sizeof(WarpSums) +
                  (run / RUNS * 2 * STATES + run % RUNS / (RUNS / 2) * STATES + n) * 4;
        step = lane / CHANNEL_LANES * BLOCK_CHANNELS * 8 + pair;
    }
};

// A lane's pair of channels in rows that are visited in order.
template <typename T>
struct Column {
    T* now;
    int64 channel;  // elements from a channel to the next

    __device__ __forceinline__ void move(int64 bytes) { now = pinned((T*)((char*)now + bytes)); }
    // The pair, of which `channels` exist; `missing` in place of the others.
    __device__ __forceinline__ Two<T> read(int channels, Two<T> missing = Two<T>()) const {
        Two<T> x = missing;
        if (PAIRED) {
            if (channels > 0) x = *(const Two<T>*)now;
        } else if (channels > 0) {
            x.set(now[0], channels > 1 ? now[channel] : missing.first());
        }
        return x;
    }
    __device__ __forceinline__ void write(float2 x, int channels) const {
        if (channels > 0) store_pair(x, now, PAIRED || channels > 1, PAIRED);
    }
};
template <typename T>
__device__ __forceinline__ Column<T> column(const T* array, int64 first, int64 channel = 1) {
    return {pinned((T*)array + first), channel};
}
