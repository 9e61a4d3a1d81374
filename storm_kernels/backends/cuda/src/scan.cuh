// What the scan and its backward share: arguments, and the mapping of threads to channels and
// states.
//
// The launch code (scan.py) defines D_STATE (states); PAIR (channels a thread), STATE_LANES,
// LANE_STATES (states a thread); INTERVAL (tokens from a checkpoint to the next), SEGMENT (tokens
// whose states the backward recomputes together); U_T, DELTA_T, B_T, C_T, Z_T (number formats).
//
// Words beside those at the head of storm_kernels/backends/contract.py. Position: index of a token
// in scan order within its sequence. Interval: the tokens from a checkpoint to the next. Block: a
// block of threads; it computes a run of BLOCK_CHANNELS channels, all of one group.
//
// A warp's lanes hold CHANNEL_LANES channel pairs times STATE_LANES runs of LANE_STATES states. With
// 16 states these are 8, 4 and 4:
//
//     lane       0  1 ... 7 |  8 ... 15 | 16 ... 23 | 24 ... 31
//     pair       0  1 ... 7 |  0 ...  7 |  0 ...  7 |  0 ...  7
//     states        0 - 3   |   4 - 7   |   8 - 11  |  12 - 15
//
// So lanes beside each other read neighbouring channels and the same B and C.
#pragma once
#include "device.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int CHANNEL_LANES = 32 / STATE_LANES;
constexpr int BLOCK_CHANNELS = WARPS * CHANNEL_LANES * PAIR;
constexpr int STATES = STATE_LANES * LANE_STATES;  // D_STATE and padding
constexpr int ITEMS = PAIR * LANE_STATES;          // states of all channels of a thread

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
    int64 group_blocks;       // blocks of channels a group: none straddles two groups
    int64 sequences;
    const int64* cu_seqlens;  // null: sequence i is batch row i
    int64 checkpoint_rows;    // checkpoints of a batch row
    int64 softplus;
    const float* initial_state;
    const Z_T* z;
    int64 z_batch;
    int64 z_row;
    int64 z_kept;             // whether z holds the kept tokens only
    const TokenEntry* map;    // (length,): where each token goes; null without a reduction
    int64 out_rows;           // L'
};

// What one block computes: a run of channels of one group, of one direction of one sequence.
struct Share {
    int64 sequence, batch, start, length, channel, group, block;
    int channels;  // of its BLOCK_CHANNELS, those that exist
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

// The row of the checkpoint at the beginning of an interval. Checkpoints are (rows, channels,
// D_STATE), the sequences' one after the other:
//
//     one sequence a batch row     | 0 1 2 ... of sequence 0 | 0 1 2 ... of sequence 1 | ...
//     packed, from token `start`   | ... | from row start / INTERVAL + sequence on | ...
__device__ __forceinline__ int64 checkpoint_row(const Problem& p, const Share& s, int64 interval) {
    return s.batch * p.checkpoint_rows + (p.cu_seqlens ? s.start / INTERVAL + s.sequence : 0) + interval;
}

// Which of the block's channels and states are this thread's: the first of each.
struct Place {
    int lane, channel, state;

    __device__ __forceinline__ Place() {
        lane = threadIdx.x % 32;
        channel = (threadIdx.x / 32 * CHANNEL_LANES + lane % CHANNEL_LANES) * PAIR;
        state = lane / CHANNEL_LANES * LANE_STATES;
    }
};

// LANE_STATES numbers beside each other; their address is a multiple of their size.
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
