// Backward of the selective scan: one block a sequence, direction and run of channels, its chunks from the last to the first.
// Of each chunk the states before every GROUP-th token are recomputed from its checkpoint and kept in shared memory; then, GROUP tokens at a time,
// the states and decays are recomputed into registers and the adjoint runs through them. With g = dL/dh and a = exp(delta A):
//     g_l = gy_l C_l + a_{l+1} g_{l+1};  du = delta (g . B) + D gy;  ddelta = u (g . B) + (g a h_{l-1}) . A;  dA += delta g a h_{l-1};
//     dB = sum over channels of g delta u;  dC = sum over channels of gy h.
// Issue slots per channel, token and state on sm_90 (S = 16, tests/test_cuda_code.py): 4.6 to save the states, 20.7 to recompute and retreat; the
// elementwise steps around them load one element at a time and come on top.
// Nothing is added atomically: what several blocks contribute to goes to partial results that sum_terms adds in order.
#include "scan.cuh"

struct Gradients {
    U_T* u;             // (batch, length, channels), as delta
    DELTA_T* delta;
    float* BC;          // (group_blocks, batch * length, groups, 2, D_STATE): partial dB and dC
    float* A;           // (sequences, channels, D_STATE): partial
    float* D;           // (sequences, channels): partial, as delta_bias
    float* delta_bias;
    float* z;           // (batch, z_rows, channels): this direction's part
};

struct BackwardArgs {
    Direction direction[2];
    Gradients gradients[2];
    Problem p;
    int64 blocks;
    int64 groups;
    int64 z_rows;
    const U_T* grad_out;
    int64 grad_out_batch;
    int64 grad_out_row;
    int64 grad_out_channel;
    const float* grad_final_state;
    float* grad_initial_state;
};

constexpr float LN2 = 0.6931471805599453f;
constexpr int OWNED = (BLOCK_CHANNELS + THREADS - 1) / THREADS;  // channels whose D and bias gradients a thread adds up

struct Shared {
    Tile tile;
    float gy[TILE][BLOCK_CHANNELS];      // gradient of y: after the gate, the pooling and the sampling
    float gB[TILE][BLOCK_CHANNELS];      // g . B; then the token's share of D's gradient
    float gaA[TILE][BLOCK_CHANNELS];     // (g a h_{l-1}) . A log2(e); then the token's share of the bias's gradient
    float y[TILE][BLOCK_CHANNELS];
    float BC[WARPS][TILE][2 * STATES];   // dB and dC, summed over each warp's channels
    float saved[CHUNK / GROUP][ITEMS][THREADS];
    Sum dA[ITEMS][THREADS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "scan_backward.py counts the same");

__device__ __forceinline__ void prepare_gradient(Shared& shared, const BackwardArgs& a, const Share& s, int64 first) {
    int tokens = (int)smaller(TILE, s.length - first);
    for (int i = threadIdx.x; i < TILE * BLOCK_CHANNELS; i += THREADS) {
        int t = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS;
        float gy = 0.0f;
        if (t < tokens && c < s.channels) {
            int64 l = s.token(first + t), e = s.channel + c, row;
            float weight = output_row(a.p, l, row);
            if (row >= 0) {
                gy = weight * to_float(a.grad_out[s.batch * a.grad_out_batch + row * a.grad_out_row + e * a.grad_out_channel]);
                if (a.p.z) {
                    float z = to_float(a.p.z[gate_index(a.p, s.batch, l, e)]);
                    gy *= z * sigmoid(z);
                }
            }
        }
        shared.gy[t][c] = gy;
    }
}

// The states of a chunk before each GROUP of its tokens, into shared memory; each thread reads back only what it wrote.
__device__ __forceinline__ void save_states(Shared& shared, const BackwardArgs& a, const Direction& d, const Share& s, const Place& at,
                                            const float (&A)[ITEMS], int64 begin, int tiles) {
    float h[ITEMS];
    load_states(h, d.checkpoints + (checkpoint_row(a.p, s, begin / CHUNK) * a.p.channels + s.channel) * D_STATE, at, s.channels);
    for (int k = 0; k < tiles; k++) {
        __syncthreads();
        prepare_tile(shared.tile, a.p, d, s, begin + k * TILE);
        __syncthreads();
        for (int q = 0; q < TILE / GROUP; q++) {
#pragma unroll
            for (int i = 0; i < ITEMS; i++) shared.saved[k * (TILE / GROUP) + q][i][threadIdx.x] = h[i];
#pragma unroll
            for (int t = q * GROUP; t < q * GROUP + GROUP; t++)
#pragma unroll
                for (int c = 0; c < PAIR; c++) {
                    float2 step = shared.tile.step[t][at.channel + c];
#pragma unroll
                    for (int n = 0; n < LANE_STATES; n++) {
                        int i = c * LANE_STATES + n;
                        h[i] = fmaf(exp2_fast(step.x * A[i]), h[i], step.y * shared.tile.B[t][at.state + n]);
                    }
                }
        }
    }
}

// One token of the adjoint: from g a of the token after it to its own; leaves the token's sums in shared memory and adds to dA.
__device__ __forceinline__ void retreat(Shared& shared, float (&g)[ITEMS], float (&dA)[ITEMS], const float (&A)[ITEMS], const float (&decay)[ITEMS],
                                        const float (&h)[ITEMS], const float (&before)[ITEMS], int t, const Place& at) {
    float channel_sums[2 * PAIR], y[PAIR], BC[2 * LANE_STATES];
#pragma unroll
    for (int n = 0; n < 2 * LANE_STATES; n++) BC[n] = 0.0f;
#pragma unroll
    for (int c = 0; c < PAIR; c++) {
        float2 step = shared.tile.step[t][at.channel + c];
        float gy = shared.gy[t][at.channel + c], gB = 0.0f, gaA = 0.0f;
        y[c] = 0.0f;
#pragma unroll
        for (int n = 0; n < LANE_STATES; n++) {
            int i = c * LANE_STATES + n;
            float B = shared.tile.B[t][at.state + n], C = shared.tile.C[t][at.state + n];
            float gh = fmaf(gy, C, g[i]);
            y[c] = fmaf(h[i], C, y[c]);
            BC[n] = fmaf(gh, step.y, BC[n]);
            BC[LANE_STATES + n] = fmaf(gy, h[i], BC[LANE_STATES + n]);
            gB = fmaf(gh, B, gB);
            g[i] = gh * decay[i];
            float through = g[i] * before[i];
            gaA = fmaf(through, A[i], gaA);
            dA[i] = fmaf(through, step.x, dA[i]);
        }
        channel_sums[c] = gB;
        channel_sums[PAIR + c] = gaA;
    }
    constexpr int SUMS = 2 * PAIR, LEFT = SUMS > STATE_LANES ? SUMS / STATE_LANES : 1;
    reduce_spread<SUMS, CHANNEL_LANES, STATE_LANES>(channel_sums, at.lane);
    if (spread_writes<SUMS, CHANNEL_LANES, STATE_LANES>(at.lane)) {
        int base = spread_base<SUMS, CHANNEL_LANES, STATE_LANES>(at.lane);
#pragma unroll
        for (int i = 0; i < LEFT; i++) {
            float(&row)[BLOCK_CHANNELS] = base + i < PAIR ? shared.gB[t] : shared.gaA[t];
            row[at.channel + (base + i) % PAIR] = channel_sums[i];
        }
    }
    reduce_spread<PAIR, CHANNEL_LANES, STATE_LANES>(y, at.lane);
    if (spread_writes<PAIR, CHANNEL_LANES, STATE_LANES>(at.lane)) {
        int base = spread_base<PAIR, CHANNEL_LANES, STATE_LANES>(at.lane);
        shared.y[t][at.channel + base] = y[0];
        if (STATE_LANES == 1) shared.y[t][at.channel + 1] = y[1];
    }
    constexpr int HELD = 2 * LANE_STATES > CHANNEL_LANES ? 2 * LANE_STATES / CHANNEL_LANES : 1;
    reduce_spread<2 * LANE_STATES, 1, CHANNEL_LANES>(BC, at.lane);
    if (spread_writes<2 * LANE_STATES, 1, CHANNEL_LANES>(at.lane)) {
        int base = spread_base<2 * LANE_STATES, 1, CHANNEL_LANES>(at.lane);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            int n = base + i;
            shared.BC[threadIdx.x / 32][t][n / LANE_STATES * STATES + at.state + n % LANE_STATES] = BC[i];
        }
    }
}

// A tile's gradients of u, delta and z, and its shares of those of B, C, D and the bias.
__device__ __forceinline__ void write_gradients(Shared& shared, const BackwardArgs& a, int which, const Share& s, int64 first, Sum (&dD)[OWNED],
                                                Sum (&dbias)[OWNED]) {
    const Direction& d = a.direction[which];
    const Gradients& grad = a.gradients[which];
    const int tokens = (int)smaller(TILE, s.length - first);
    for (int i = threadIdx.x; i < tokens * BLOCK_CHANNELS; i += THREADS) {
        int t = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS;
        if (c >= s.channels) continue;
        int64 l = s.token(first + t), e = s.channel + c, at = (s.batch * a.p.length + l) * a.p.channels + e, row;
        float u = to_float(d.u[s.batch * d.u_batch + l * d.u_row + e]), skip = d.D ? d.D[e] : 0.0f;
        float gB = shared.gB[t][c], gy = shared.gy[t][c];
        float ddelta = fmaf(gB, u, shared.gaA[t][c] * LN2);
        if (a.p.softplus) {
            float raw = to_float(d.delta[s.batch * d.delta_batch + l * d.delta_row + e]) + (d.delta_bias ? d.delta_bias[e] : 0.0f);
            ddelta *= sigmoid(raw);
        }
        if (grad.u) from_float(fmaf(gB, shared.tile.step[t][c].x, skip * gy), grad.u[at]);
        if (grad.delta) from_float(ddelta, grad.delta[at]);
        shared.gB[t][c] = gy * u;
        shared.gaA[t][c] = ddelta;
        if (!grad.z) continue;
        float weight = output_row(a.p, l, row), gz = 0.0f;
        if (row >= 0) {
            float z = to_float(a.p.z[gate_index(a.p, s.batch, l, e)]), open = sigmoid(z);
            float gout = weight * to_float(a.grad_out[s.batch * a.grad_out_batch + row * a.grad_out_row + e * a.grad_out_channel]);
            gz = gout * fmaf(skip, u, shared.y[t][c]) * open * fmaf(z, 1.0f - open, 1.0f);
        } else if (a.p.z_kept) {
            continue;
        }
        grad.z[(s.batch * a.z_rows + (a.p.z_kept ? a.p.map[l].kept : l)) * a.p.channels + e] = gz;
    }
    if (grad.BC) {
        const int64 rows = a.p.length * (a.p.cu_seqlens ? 1 : a.p.sequences);
        for (int i = threadIdx.x; i < tokens * 2 * STATES; i += THREADS) {
            int t = i / (2 * STATES), n = i % STATES, kind = i / STATES % 2;
            if (n >= D_STATE) continue;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += shared.BC[w][t][kind * STATES + n];
            int64 row = s.block % a.p.group_blocks * rows + s.batch * a.p.length + s.token(first + t);
            grad.BC[((row * a.groups + s.group) * 2 + kind) * D_STATE + n] = sum;
        }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < OWNED; k++) {
        int c = threadIdx.x + k * THREADS;
        if (c >= s.channels) continue;
        float tile_D = 0.0f, tile_bias = 0.0f;
        for (int t = 0; t < tokens; t++) {
            tile_D += shared.gB[t][c];
            tile_bias += shared.gaA[t][c];
        }
        dD[k].add(tile_D);
        dbias[k].add(tile_bias);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) scan_backward(const __grid_constant__ BackwardArgs a) {
    DYNAMIC_SHARED(memory);
    Shared& shared = *(Shared*)memory;
    const int64 work = blockIdx.x;
    const int which = work / (a.blocks * a.p.sequences);
    const Direction& d = a.direction[which];
    const Gradients& grad = a.gradients[which];
    const Share s = share_of(a.p, d, work / a.blocks % a.p.sequences, work % a.blocks);
    const Place at;
    const int64 state_row = (s.sequence * a.p.channels + s.channel) * D_STATE;

    float A[ITEMS], g[ITEMS], dA[ITEMS];
    Sum dD[OWNED], dbias[OWNED];
    load_states(A, d.A + s.channel * D_STATE, at, s.channels);
    load_states(g, a.grad_final_state ? a.grad_final_state + state_row : nullptr, at, s.channels);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        A[i] *= LOG2E;
        dA[i] = 0.0f;
        shared.dA[i][threadIdx.x] = Sum();
    }

    for (int64 chunk = (s.length + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
        const int64 begin = chunk * CHUNK;
        const int tiles = (int)((smaller(CHUNK, s.length - begin) + TILE - 1) / TILE);
        save_states(shared, a, d, s, at, A, begin, tiles);
        for (int k = tiles - 1; k >= 0; k--) {
            __syncthreads();
            prepare_tile(shared.tile, a.p, d, s, begin + k * TILE);
            prepare_gradient(shared, a, s, begin + k * TILE);
            __syncthreads();
            for (int q = TILE / GROUP - 1; q >= 0; q--) {
                float h[GROUP + 1][ITEMS], decay[GROUP][ITEMS];
#pragma unroll
                for (int i = 0; i < ITEMS; i++) h[0][i] = shared.saved[k * (TILE / GROUP) + q][i][threadIdx.x];
#pragma unroll
                for (int t = 0; t < GROUP; t++)
#pragma unroll
                    for (int i = 0; i < ITEMS; i++) {
                        float2 step = shared.tile.step[q * GROUP + t][at.channel + i / LANE_STATES];
                        decay[t][i] = exp2_fast(step.x * A[i]);
                        h[t + 1][i] = fmaf(decay[t][i], h[t][i], step.y * shared.tile.B[q * GROUP + t][at.state + i % LANE_STATES]);
                    }
#pragma unroll
                for (int t = GROUP - 1; t >= 0; t--) retreat(shared, g, dA, A, decay[t], h[t + 1], h[t], q * GROUP + t, at);
            }
            __syncthreads();
            write_gradients(shared, a, which, s, begin + k * TILE, dD, dbias);
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                shared.dA[i][threadIdx.x].add(dA[i]);
                dA[i] = 0.0f;
            }
        }
    }
    if (a.grad_initial_state) store_states(g, a.grad_initial_state + state_row, at, s.channels);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) dA[i] = shared.dA[i][threadIdx.x].value;
    if (grad.A) store_states(dA, grad.A + state_row, at, s.channels);
#pragma unroll
    for (int k = 0; k < OWNED; k++) {
        int c = threadIdx.x + k * THREADS;
        if (c < s.channels && grad.D) grad.D[s.sequence * a.p.channels + s.channel + c] = dD[k].value;
        if (c < s.channels && grad.delta_bias) grad.delta_bias[s.sequence * a.p.channels + s.channel + c] = dbias[k].value;
    }
}
