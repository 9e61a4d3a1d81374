// What the scan's backward is built of: arguments, shared memory, and how a lane finds its share of
// arrays there and in device memory.
//
// Defined by the launch code (scan_backward.py) besides scan.cuh's names: GY_T (format of dL/dy);
// SOFTPLUS; PAIRED: channels come in aligned pairs, states too; TILE: tokens whose B and C are
// prepared together, GROUP or CHUNK; BATCH: tokens between two elementwise steps, at most
// STATE_LANES.
#pragma once
#include "scan.cuh"

struct Gradients {
    U_T* u;             // (batch, length, channels), as delta
    DELTA_T* delta;
    float* BC;          // (group_blocks, batch * length, groups, 2, D_STATE): partial dB and dC
    float* A;           // (sequences, channels, D_STATE): partial
    float* D;           // (sequences, channels): partial, as delta_bias
    float* delta_bias;
};

// Bytes from a batch to the next in scan order.
struct Steps {
    int64 B;   // from a token to the next, as C
    int64 C;
    int64 u;
    int64 delta;
    int64 du;
    int64 ddelta;
    int64 gy;
    int64 BC;  // from a group to the next
};

struct BackwardArgs {
    Direction direction[2];
    Gradients gradients[2];
    Steps steps[2];
    Problem p;
    int64 blocks;
    int64 groups;
    float* dA_sums;     // (blocks of threads, 2, 2 LANE_STATES, THREADS): what each thread has summed, and lost
    const GY_T* gy;     // (batch, length, channels): dL/dy, of both directions; any strides
    int64 gy_batch;
    int64 gy_row;
    int64 gy_channel;
    const float* grad_final_state;
    float* grad_initial_state;
};

constexpr float LN2 = 0.6931471805599453f;
constexpr int GROUPS = CHUNK / GROUP;
constexpr int RUN = LANE_STATES < 4 ? LANE_STATES : 4;         // floats moved at once
constexpr int RUNS = 2 * LANE_STATES / RUN;                    // of a lane's dB and dC
constexpr int GROUP_FLOATS = GROUP * 2 * STATES;               // of dB and dC
// That a thread writes at once
constexpr int PIECE = GROUP_FLOATS / THREADS < 1 ? 1 : GROUP_FLOATS / THREADS < RUN ? GROUP_FLOATS / THREADS : RUN;
constexpr int OUTPUTS = BATCH * RUNS * STATE_LANES;            // runs of a warp's dB and dC in a batch
constexpr int LIVE = OUTPUTS < 32 ? OUTPUTS : 32;               // lanes that add them up, in 32 / LIVE pieces
constexpr int PARTS = CHANNEL_LANES * LIVE / 32 > 1 ? CHANNEL_LANES * LIVE / 32 : 1;  // a piece
// Padded: the lanes of one output write without a bank conflict
constexpr int ROW = OUTPUTS * RUN + (RUN == 4 ? RUN : 1);

// A warp's sums of dB and dC. Where a lane has one run of each, an output's first part and its sum
// are equally far from the beginnings of the two.
struct WarpSums {
    __align__(16) float state[CHANNEL_LANES][ROW];             // each lane's part of dB and dC of a batch
    __align__(16) float BC[GROUP][2 * STATES];                 // dB and dC, summed over the warp's channels
};

// A pair's bias and D lie together, for one load, but on sm_100: there the pair of them spills a
// register.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool TOGETHER = false;
#else
constexpr bool TOGETHER = true;
#endif
__device__ __forceinline__ int term_at(int which, int c) {
    return TOGETHER ? c / PAIR * 2 * PAIR + which * PAIR + c % PAIR : which * BLOCK_CHANNELS + c;
}

struct Shared {
    // States before each group: a thread reads back what it wrote
    __align__(16) float saved[GROUPS][RUNS][THREADS][RUN];
    __align__(16) float4 step[CHUNK][BLOCK_CHANNELS / PAIR];   // a pair's log2(e) delta, and its delta u
    __align__(16) float B[TILE][STATES];
    __align__(16) float C[TILE][STATES];
    __align__(16) float channel[BATCH][THREADS][2 * PAIR];      // each lane's part of g . B and (g a h_{l-1}) . A
    __align__(16) WarpSums warp[WARPS];
    __align__(16) float gy[BATCH][BLOCK_CHANNELS];             // dL/dy
    __align__(16) float terms[2 * BLOCK_CHANNELS];             // each channel's bias and D, at term_at()
    // A chunk's share of each lane's gradients of D and the bias
    __align__(16) float row_sums[THREADS][2 * PAIR];
    Sum dD[PAIR][THREADS];                                     // each lane's own, like the bias's
    Sum dbias[PAIR][THREADS];
    // Of the sequence's token at position 0; kept here for want of registers
    __align__(16) const B_T* B_rows;
    const C_T* C_rows;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "scan_backward.py counts the same");
static_assert(BATCH <= STATE_LANES && GROUP % BATCH == 0, "a lane has one pair of a batch");

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

// A thread's states in an array whose row 0 is its first channel; zero where there are none.
__device__ __forceinline__ void load_runs(float (&v)[ITEMS], const float* from, int state, int channels) {
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

// A value that is kept in a register rather than computed anew at each use.
#ifndef STORM_ON_CPU
template <typename T>
__device__ __forceinline__ T* pinned(T* x) {
    asm volatile("" : "+l"(x));
    __builtin_assume(__isGlobal(x));
    return x;
}
__device__ __forceinline__ uint32 pinned(uint32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
#else
template <typename T>
inline T* pinned(T* x) {
    return x;
}
inline uint32 pinned(uint32 x) { return x; }
#endif

// Where a lane's share lies within the arrays of `Shared`, in bytes.
struct Offsets {
    uint32 pair;      // of the channels, 16 bytes each pair
    uint32 states;    // of the states
    uint32 own;       // of the thread, 16 bytes each
    uint32 part;      // its parts of dB and dC
    uint32 element;   // the first part of its element of a batch, 16 bytes each
    uint32 output;    // the first part of the run of dB or dC it adds up
    uint32 sum;       // where that sum goes; `output` where a lane's dB and dC are a run each
    uint32 step;      // of its element, 16 bytes each pair; cheap from `pair`, and a register more spills on sm_100

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
template <typename T>
__device__ __forceinline__ T* beyond(T* first, uint32 bytes) {
    return (T*)((char*)first + bytes);
}
template <typename T>
__device__ __forceinline__ const T* beyond(const T* first, uint32 bytes) {
    return (const T*)((const char*)first + bytes);
}

// A lane's pair of channels in rows that are visited in order.
template <typename T>
struct Column {
    T* now;
    int64 channel;  // elements from a channel to the next

    // Bytes on.
    __device__ __forceinline__ void move(int64 bytes) { now = pinned((T*)((char*)now + bytes)); }
    // `missing` where there is no channel.
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
