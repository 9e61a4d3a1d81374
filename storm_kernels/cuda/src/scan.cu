// Forward selective scan (SPEC.md, Mixer): one block a sequence, direction and run of channels; sequential in time, states in registers.
// A tile passes through four steps: its inputs arrive (stage.cuh, while the tile before is computed); delta and B, C are prepared in float32; the
// recurrence runs, each thread leaving its states' part of y; the parts are added, gated, reduced and written.
//
// Issue slots per channel, token and state on sm_90, counted in the machine code by tests/test_cuda_code.py (S = 16, bfloat16, gate, no reduction):
// 5.6 in the recurrence, of which one exp2; 9.4 with all else in the loop over tiles, the checkpoint's rare store counted as if at every tile.
#include "stage.cuh"

struct ScanArgs {
    Direction direction[2];
    Problem p;
    int64 blocks;        // channel blocks
    U_T* out;            // (batch, L', channels); with PARTIAL each direction writes its own `partial`
    float* partial[2];   // (batch, L', channels) float32; zeros if a reduction's sums do not fit in shared memory
    float* final_state;  // or null
    int64 cells;         // H' W' with a reduction: cells that are open at a time, their sums in shared memory; 0 if they do not fit
};

constexpr int CHANNEL_PAIRS = BLOCK_CHANNELS / PAIR;
constexpr int STRIDE = THREADS / CHANNEL_PAIRS;                     // tokens between two of a thread's in the elementwise steps
constexpr int ROUNDS = (TILE + STRIDE - 1) / STRIDE;
constexpr int PART = BLOCK_CHANNELS + (STATE_LANES > 1 ? 16 : 0);  // padded: two state lanes write without a bank conflict

struct Shared {
    __align__(16) Stage stage[2];
    Tile tile;
    __align__(16) float y[TILE][STATE_LANES][PART];  // parts of h . C; the first ones then hold the gated y of a reduction
    __align__(16) TokenEntry map[3][TILE];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "scan.py counts the same");

// The elementwise steps' share of a thread: one pair of channels, every STRIDE-th token.
struct Pair {
    int channel, token, channels;  // of the pair's channels, those that exist
    float bias[PAIR], skip[PAIR];
    int64 out;                     // where the pair of this tile's first token goes
    int64 out_row;                 // from there to the next token's in scan order

    __device__ __forceinline__ Pair(const Problem& p, const Direction& d, const Share& s) {
        channel = threadIdx.x % CHANNEL_PAIRS * PAIR;
        token = threadIdx.x / CHANNEL_PAIRS;
        channels = (int)smaller(PAIR, s.channels - channel);
#pragma unroll
        for (int c = 0; c < PAIR; c++) {
            bias[c] = c < channels && d.delta_bias ? d.delta_bias[s.channel + channel + c] : 0.0f;
            skip[c] = c < channels && d.D ? d.D[s.channel + channel + c] : 0.0f;
        }
        out_row = s.reverse ? -p.channels : p.channels;
        out = (s.batch * p.length + s.token(0)) * p.channels + token * out_row + s.channel + channel;
    }
};

__device__ __forceinline__ void prepare(Tile& tile, const Stage& stage, const Pair& at, int tokens) {
    const int tokens_x = at.channels > 0 ? tokens : 0, tokens_y = at.channels > 1 ? tokens : 0;
#pragma unroll
    for (int k = 0; k < ROUNDS; k++) {
        int t = at.token + k * STRIDE;
        if (TILE % STRIDE != 0 && t >= TILE) break;
        float2 delta = load_pair(&stage.delta[t][at.channel]), u = load_pair(&stage.u[t][at.channel]);
        delta.x += at.bias[0];
        delta.y += at.bias[1];
        if (SOFTPLUS) delta = make_float2(softplus(delta.x), softplus(delta.y));
        if (t >= tokens_x) delta.x = 0.0f;
        if (t >= tokens_y) delta.y = 0.0f;
        *(float4*)&tile.step[t][at.channel] = make_float4(delta.x, delta.x * u.x, delta.y, delta.y * u.y);
    }
    constexpr int PAIRS = TILE * STATES / 2;  // of neighbouring states or, where there is one, tokens
#pragma unroll
    for (int k = 0; k < (PAIRS + THREADS - 1) / THREADS; k++) {
        int i = threadIdx.x + k * THREADS;
        if (PAIRS % THREADS != 0 && i >= PAIRS) break;
        *(float2*)(&tile.B[0][0] + 2 * i) = load_pair(&stage.B[0][0] + 2 * i);
        *(float2*)(&tile.C[0][0] + 2 * i) = load_pair(&stage.C[0][0] + 2 * i);
    }
}

// One token for this thread's states: h = exp(delta A) h + delta u B and, with OUTPUT, its part of h . C.
template <bool OUTPUT>
__device__ __forceinline__ void advance(float (&h)[ITEMS], const float (&A)[ITEMS], Shared& shared, int t, const Place& at) {
    const float4 step = *(const float4*)&shared.tile.step[t][at.channel];
    float B[LANE_STATES], C[LANE_STATES], y[PAIR] = {0.0f, 0.0f};
    load_run(B, &shared.tile.B[t][at.state]);
    if (OUTPUT) load_run(C, &shared.tile.C[t][at.state]);
#pragma unroll
    for (int c = 0; c < PAIR; c++) {
        float delta = c ? step.z : step.x, input = c ? step.w : step.y;
#pragma unroll
        for (int n = 0; n < LANE_STATES; n++) {
            int i = c * LANE_STATES + n;
            h[i] = fmaf(exp2_fast(delta * A[i]), h[i], input * B[n]);
            if (OUTPUT) y[c] = n ? fmaf(h[i], C[n], y[c]) : h[i] * C[n];
        }
    }
    if (OUTPUT) *(float2*)&shared.y[t][at.state / LANE_STATES][at.channel] = make_float2(y[0], y[1]);
}

// Adds the parts of y, D u and the gate; writes the rows or, with a reduction, leaves the weighted values for `add_to_cells`.
__device__ __forceinline__ void finish(Shared& shared, const Stage& stage, const TokenEntry (&map)[TILE], const ScanArgs& a, Pair& at, int tokens,
                                       float* partial) {
    const int limit = at.channels > 0 ? tokens : 0;
#pragma unroll
    for (int k = 0; k < ROUNDS; k++) {
        int t = at.token + k * STRIDE;
        if (t >= limit) break;
        float2 u = load_pair(&stage.u[t][at.channel]);
        float2 y = make_float2(at.skip[0] * u.x, at.skip[1] * u.y);
#pragma unroll
        for (int j = 0; j < STATE_LANES; j++) {
            float2 part = load_pair(&shared.y[t][j][at.channel]);
            y = make_float2(y.x + part.x, y.y + part.y);
        }
        if (GATED) {
            float2 z = load_pair(&stage.z[t][at.channel]);
            y = make_float2(y.x * z.x * sigmoid(z.x), y.y * z.y * sigmoid(z.y));
        }
        const bool whole = ASYNC || at.channels == PAIR;
        const int64 to = at.out + k * STRIDE * at.out_row;
        if (REDUCED)
            *(float2*)&shared.y[t][0][at.channel] = make_float2(y.x * map[t].weight, y.y * map[t].weight);
        else if (PARTIAL)
            store_pair(y, partial + to, whole, ASYNC);
        else
            store_pair(y, a.out + to, whole, ASYNC);
    }
}

// A reduction's sums lie in shared memory, [cells][BLOCK_CHANNELS], each channel one thread's. The frames of a pooled group follow each other in
// either order: when another group begins, all its cells are complete.
struct OpenCells {
    float* sums;
    int64 begin;  // first cell of the open group, or -1

    __device__ __forceinline__ void close(const ScanArgs& a, const Share& s, float* partial) {
        if (begin >= 0)
            for (int64 i = threadIdx.x; i < a.cells * BLOCK_CHANNELS; i += THREADS)
                if (i % BLOCK_CHANNELS < s.channels)
                    partial[(s.batch * a.p.out_rows + begin + i / BLOCK_CHANNELS) * a.p.channels + s.channel + i % BLOCK_CHANNELS] = sums[i];
    }
    __device__ __forceinline__ void open(const ScanArgs& a, int64 cell) {
        begin = cell / a.cells * a.cells;
        for (int64 i = threadIdx.x; i < a.cells * BLOCK_CHANNELS; i += THREADS) sums[i] = 0.0f;
    }
};

__device__ __forceinline__ void add_to_cells(OpenCells& cells, const Shared& shared, const TokenEntry (&map)[TILE], const ScanArgs& a, const Share& s,
                                             int tokens, float* partial) {
    for (int t = 0; t < tokens; t++) {
        int64 cell = map[t].cell;
        if (cell < 0) continue;
        if (a.cells == 0) {
            for (int c = threadIdx.x; c < s.channels; c += THREADS)
                partial[(s.batch * a.p.out_rows + cell) * a.p.channels + s.channel + c] += shared.y[t][0][c];
            continue;
        }
        if (cells.begin < 0 || cell < cells.begin || cell >= cells.begin + a.cells) {
            __syncthreads();
            cells.close(a, s, partial);
            __syncthreads();
            cells.open(a, cell);
            __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < (BLOCK_CHANNELS + THREADS - 1) / THREADS; k++) {
            int c = threadIdx.x + k * THREADS;
            if (c < BLOCK_CHANNELS) cells.sums[(cell - cells.begin) * BLOCK_CHANNELS + c] += shared.y[t][0][c];
        }
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
    Pair pair(a.p, d, s);
    Inputs inputs(a.p, d, s);
    OpenCells cells{(float*)(&shared + 1), -1};

    float A[ITEMS], h[ITEMS];
    load_states(A, d.A + s.channel * D_STATE, at, s.channels);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) A[i] *= LOG2E;
    const int64 state_row = (s.sequence * a.p.channels + s.channel) * D_STATE;
    load_states(h, a.p.initial_state ? a.p.initial_state + state_row : nullptr, at, s.channels);

    stage_map(shared.map[0], a.p, s, 0);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    if (s.length > 0) inputs.stage(shared.stage[0], a.p, s, shared.map[0], 0);
    stage_map(shared.map[1], a.p, s, TILE);
    copy_commit();
    int tile = 0;
    for (int64 first = 0; first < s.length; first += TILE, tile++) {
        const Stage& stage = shared.stage[tile % 2];
        const TokenEntry(&map)[TILE] = shared.map[tile % 3];
        const int tokens = (int)smaller(TILE, s.length - first);
        if (d.checkpoints && first % CHUNK == 0)
            store_states(h, d.checkpoints + (checkpoint_row(a.p, s, first / CHUNK) * a.p.channels + s.channel) * D_STATE, at, s.channels);
        copy_wait<0>();
        __syncthreads();
        if (first + TILE < s.length) inputs.stage(shared.stage[(tile + 1) % 2], a.p, s, shared.map[(tile + 1) % 3], first + TILE);
        stage_map(shared.map[(tile + 2) % 3], a.p, s, first + 2 * TILE);
        copy_commit();
        prepare(shared.tile, stage, pair, tokens);
        bool any_kept = true;
        if (REDUCED)
            any_kept = __syncthreads_or((int)threadIdx.x < tokens && map[threadIdx.x].cell >= 0);
        else
            __syncthreads();
        if (any_kept) {
#pragma unroll UNROLL
            for (int t = 0; t < TILE; t++) advance<true>(h, A, shared, t, at);
            __syncthreads();
            finish(shared, stage, map, a, pair, tokens, a.partial[which]);
            if (REDUCED) {
                __syncthreads();
                add_to_cells(cells, shared, map, a, s, tokens, a.partial[which]);
            }
        } else {
#pragma unroll UNROLL
            for (int t = 0; t < TILE; t++) advance<false>(h, A, shared, t, at);
        }
        pair.out += TILE * pair.out_row;
    }
    if (REDUCED) {
        __syncthreads();
        cells.close(a, s, a.partial[which]);
    }
    if (a.final_state) store_states(h, a.final_state + state_row, at, s.channels);
}
