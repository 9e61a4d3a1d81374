// What the scan and its backward share: arguments, and the mapping of threads to channels and
// states.
//
// Defined by the launch code (scan.py): D_STATE; STATE_LANES, LANE_STATES; TILE, CHUNK, GROUP
// (tokens); U_T, DELTA_T, B_T, C_T, Z_T (formats).
//
// Glossary. Position: index of a token in scan order within its sequence. Tile: tokens prepared
// together in shared memory. Chunk: tokens between two checkpoints. Cell: row of the reduced output
// that a token is averaged into. A warp's lanes hold CHANNEL_LANES channel pairs (low bits) times
// STATE_LANES runs of LANE_STATES states (high bits), so that lanes beside each other read
// neighbouring channels and the same B and C.
#pragma once
#include "device.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int CHANNEL_LANES = 32 / STATE_LANES;
constexpr int PAIR = 2;                                  // channels a thread
constexpr int BLOCK_CHANNELS = WARPS * CHANNEL_LANES * PAIR;
constexpr int STATES = STATE_LANES * LANE_STATES;        // D_STATE and padding
constexpr int ITEMS = PAIR * LANE_STATES;                // states a thread

struct Direction {
    const U_T* u;
    int64 u_batch;
    int64 u_row;
    const DELTA_T* delta;
    int64 delta_batch;
    int64 delta_row;
    const B_T* B;
    int64 B_batch;
    int64 B_row;
    int64 B_group;
    const C_T* C;
    int64 C_batch;
    int64 C_row;
    int64 C_group;
    const float* A;
    const float* D;
    const float* delta_bias;
    int64 reverse;
    float* checkpoints;
};

struct Problem {
    int64 length;
    int64 channels;
    int64 group_channels;
    int64 group_blocks;       // channel blocks a group: a block never straddles two
    int64 sequences;
    const int64* cu_seqlens;  // null: sequence i is batch row i
    int64 checkpoint_rows;    // a batch row
    int64 softplus;
    const float* initial_state;
    const Z_T* z;
    int64 z_batch;
    int64 z_row;
    int64 z_kept;             // z holds the kept tokens only
    const TokenEntry* map;    // (length,), null without a reduction
    int64 out_rows;           // L'
};

// One block's share: a sequence, a direction, a run of channels of one group.
struct Share {
    int64 sequence, batch, start, length, channel, group, block;
    int channels;             // of BLOCK_CHANNELS, those that exist
    bool reverse;

    __device__ __forceinline__ int64 token(int64 position) const {
        return reverse ? start + length - 1 - position : start + position;
    }
};

__device__ __forceinline__ Share share_of(const Problem& p, const Direction& d, int64 sequence, int64 block) {
    Share s;
    s.sequence = sequence;
    s.batch = p.cu_seqlens ? 0 : sequence;
    s.start = p.cu_seqlens ? p.cu_seqlens[sequence] : 0;
    s.length = p.cu_seqlens ? p.cu_seqlens[sequence + 1] - s.start : p.length;
    s.block = block;
    s.group = block / p.group_blocks;
    int64 inside = block % p.group_blocks * BLOCK_CHANNELS;
    s.channel = s.group * p.group_channels + inside;
    s.channels = (int)smaller(BLOCK_CHANNELS, p.group_channels - inside);
    s.reverse = d.reverse;
    return s;
}

__device__ __forceinline__ int64 checkpoint_row(const Problem& p, const Share& s, int64 chunk) {
    return s.batch * p.checkpoint_rows + (p.cu_seqlens ? s.start / CHUNK + s.sequence : 0) + chunk;
}

// Where this thread's channels and states lie within the block.
struct Place {
    int lane, channel, state;  // channel: the first of its pair

    __device__ __forceinline__ Place() {
        lane = threadIdx.x % 32;
        channel = (threadIdx.x / 32 * CHANNEL_LANES + lane % CHANNEL_LANES) * PAIR;
        state = lane / CHANNEL_LANES * LANE_STATES;
    }
};

// A run of a thread's states, aligned as a whole.
__device__ __forceinline__ void load_run(float (&v)[LANE_STATES], const float* from) {
    if (LANE_STATES % 4 == 0) {
#pragma unroll
        for (int i = 0; i < LANE_STATES / 4; i++) {
            const float4 four = ((const float4*)from)[i];
            v[4 * i] = four.x;
            v[4 * i + 1] = four.y;
            v[4 * i + 2] = four.z;
            v[4 * i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < LANE_STATES; i++) v[i] = from[i];
    }
}

// The thread's states in an array (channels, D_STATE) whose row 0 is the block's first channel;
// zero where there are none.
__device__ __forceinline__ void load_states(float (&v)[ITEMS], const float* from, const Place& at, int channels) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int channel = at.channel + i / LANE_STATES, state = at.state + i % LANE_STATES;
        v[i] = from && channel < channels && state < D_STATE ? from[(int64)channel * D_STATE + state] : 0.0f;
    }
}
__device__ __forceinline__ void store_states(const float (&v)[ITEMS], float* to, const Place& at, int channels) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int channel = at.channel + i / LANE_STATES, state = at.state + i % LANE_STATES;
        if (channel < channels && state < D_STATE) to[(int64)channel * D_STATE + state] = v[i];
    }
}
