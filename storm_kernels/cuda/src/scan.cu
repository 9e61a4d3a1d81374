// Forward selective scan (SPEC.md, Mixer): one block a sequence, direction and run of channels; sequential in time, states in registers.
#include "scan.cuh"

struct ScanArgs {
    Direction direction[2];
    Problem p;
    int64 blocks;        // channel blocks
    U_T* out;            // (batch, L', channels), or null: each direction writes its own `partial`
    float* partial[2];   // (batch, L', channels) float32; zeros beforehand with a reduction
    float* final_state;  // or null
};

struct Shared {
    Tile tile;
    float y[TILE][BLOCK_CHANNELS];
};

// One token for this thread's states: h = exp(delta A) h + delta u B; returns this thread's part of h . C for each channel of the pair.
__device__ __forceinline__ void advance(float (&h)[ITEMS], float (&y)[PAIR], const float (&A)[ITEMS], const Tile& tile, int t, const Place& at) {
#pragma unroll
    for (int c = 0; c < PAIR; c++) {
        float2 step = tile.step[t][at.channel + c];
        y[c] = 0.0f;
#pragma unroll
        for (int n = 0; n < LANE_STATES; n++) {
            int i = c * LANE_STATES + n;
            h[i] = fmaf(exp2_fast(step.x * A[i]), h[i], step.y * tile.B[t][at.state + n]);
            y[c] = fmaf(h[i], tile.C[t][at.state + n], y[c]);
        }
    }
}

// D u, the gate and the share in the cell; then the rows themselves or, with a reduction, their sums, each channel by one thread.
__device__ __forceinline__ void write_tile(Shared& shared, const ScanArgs& a, const Direction& d, const Share& s, int64 first, float* partial) {
    const Problem& p = a.p;
    int tokens = (int)smaller(TILE, s.length - first);
    for (int i = threadIdx.x; i < tokens * BLOCK_CHANNELS; i += THREADS) {
        int t = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS;
        if (c >= s.channels) continue;
        int64 l = s.token(first + t), e = s.channel + c, row;
        float weight = output_row(p, l, row);
        if (row < 0) continue;
        float y = shared.y[t][c];
        if (d.D) y = fmaf(d.D[e], to_float(d.u[s.batch * d.u_batch + l * d.u_row + e]), y);
        y *= weight;
        if (p.z) {
            float z = to_float(p.z[gate_index(p, s.batch, l, e)]);
            y *= z * sigmoid(z);
        }
        if (p.cells) {
            shared.y[t][c] = y;
        } else if (partial) {
            partial[(s.batch * p.out_rows + row) * p.channels + e] = y;
        } else {
            from_float(y, a.out[(s.batch * p.out_rows + row) * p.channels + e]);
        }
    }
    if (!p.cells) return;
    __syncthreads();
    for (int c = threadIdx.x; c < s.channels; c += THREADS)
        for (int t = 0; t < tokens; t++) {
            int64 cell = p.cells[s.token(first + t)];
            if (cell >= 0) partial[(s.batch * p.out_rows + cell) * p.channels + s.channel + c] += shared.y[t][c];
        }
}

extern "C" __global__ void __launch_bounds__(THREADS) scan(const __grid_constant__ ScanArgs a) {
    DYNAMIC_SHARED(memory);
    Shared& shared = *(Shared*)memory;
    int64 work = blockIdx.x;
    const int which = work / (a.blocks * a.p.sequences);
    const Direction& d = a.direction[which];
    const Share s = share_of(a.p, d, work / a.blocks % a.p.sequences, work % a.blocks);
    const Place at;

    float A[ITEMS], h[ITEMS];
    load_states(A, d.A + s.channel * D_STATE, at, s.channels);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) A[i] *= LOG2E;
    const int64 state_row = (s.sequence * a.p.channels + s.channel) * D_STATE;
    load_states(h, a.p.initial_state ? a.p.initial_state + state_row : nullptr, at, s.channels);

    for (int64 first = 0; first < s.length; first += TILE) {
        if (d.checkpoints && first % CHUNK == 0)
            store_states(h, d.checkpoints + (checkpoint_row(a.p, s, first / CHUNK) * a.p.channels + s.channel) * D_STATE, at, s.channels);
        __syncthreads();
        prepare_tile(shared.tile, a.p, d, s, first);
        __syncthreads();
#pragma unroll 2
        for (int t = 0; t < TILE; t++) {
            float y[PAIR];
            advance(h, y, A, shared.tile, t, at);
            reduce_spread<PAIR, CHANNEL_LANES, STATE_LANES>(y, at.lane);
            if (spread_writes<PAIR, CHANNEL_LANES, STATE_LANES>(at.lane)) {
                int c = spread_base<PAIR, CHANNEL_LANES, STATE_LANES>(at.lane);
                shared.y[t][at.channel + c] = y[0];
                if (STATE_LANES == 1) shared.y[t][at.channel + 1] = y[1];
            }
        }
        __syncthreads();
        write_tile(shared, a, d, s, first, a.partial[which]);
    }
    if (a.final_state) store_states(h, a.final_state + state_row, at, s.channels);
}
