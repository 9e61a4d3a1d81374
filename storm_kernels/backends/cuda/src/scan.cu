// Forward scan (docs/spec.md, Mixer), sequential in time, states in registers. A block takes a run of
// channels of one direction of one sequence through all its tokens, or through some of them
// (tickets.cuh), tile after tile:
//
//     inputs arrive      while the tile before is computed (stage.cuh)
//     they are prepared  delta, delta u, B, C in float32 (tile.cuh)
//     the recurrence     each thread leaves its states' part of y
//     the output         parts of y added, gated, reduced (cells.cuh) and written
//
// The budget is 8 issue slots per channel, token and state, because the unit that computes exp2 takes
// 8 cycles for a warp: tests/backends/test_cuda_code.py counts them in the machine code,
// docs/kernels.md has what it counted.
#include "cells.cuh"
#include "tickets.cuh"

struct ScanArgs {
    Direction direction[2];
    Problem p;
    int64 blocks;        // of channels
    U_T* out;            // (batch, L', channels); with PARTIAL null, and each direction writes its `partial`
    float* partial[2];   // (batch, L', channels) float32; zeros if a reduction's sums do not fit in shared memory
    float* y[2];         // with SAVE_Y, for the backward: (batch, kept_rows, channels), y before the gate
    int64 kept_rows;     // kept tokens of a batch row
    float* states;       // (directions, sequences, channels, D_STATE): after the last token, before that after each
                         // step; null if nobody reads them
    int64 cells;         // with a reduction, of a pool: H' W'; 0 if their sums do not fit in shared memory
    int64 pool_tokens;   // with a reduction, of a whole pool; 0 if every tile is for `run_any`
    Tickets tickets;
};

// A block at work on its share.
struct Scan {
    const ScanArgs& a;
    const Direction& d;
    const Share s;
    const int64 checkpoint;  // the row of the share's first one
    Shared& shared;
    const Place place;
    const Quad quad;
    const Lane lane;
    Inputs inputs;
    OutputRows<float> partial, saved;
    OutputRows<U_T> out;
    OpenCells open;
    const Reduced reduced;
    float* const y_rows;     // with SAVE_Y: where the batch row's y begins
    float A[ITEMS], h[ITEMS];
    int64 position;  // of the next tile's first token
    int rest;        // tokens from there on, at most FAR
    int half;        // bytes to the stage where the next tile's inputs are
    int left;        // with a reduction: tokens of the pool from there on, 0 if not known
    bool dropped;    // whether sampling drops that pool

    __device__ __forceinline__ Scan(const ScanArgs& a, Shared& shared, int which, const Share& s, int64 checkpoint)
        : a(a), d(a.direction[which]), s(s), checkpoint(checkpoint), shared(shared), quad(d, s), lane(place),
          inputs(a.p, d, s), partial(a.partial[which], a.p, s, quad),
          saved(SAVE_Y && !REDUCED ? a.y[which] : nullptr, a.p, s, quad),
          out(a.out, a.p, s, quad), open((float*)(&shared + 1), a.p, s, quad),
          reduced{a.partial[which], (int)a.cells},
          y_rows(SAVE_Y ? a.y[which] + s.batch * a.kept_rows * a.p.channels : nullptr), position(0), rest(0),
          half(0), left(0), dropped(false) {
        load_states(A, d.A + s.channel * D_STATE, place, s.channels);
    }
    __device__ __forceinline__ Stage& stage() { return *past(&shared.stage[0], half); }

    // Waits for the next tile's inputs, asks for those of the tile after it, and prepares the tile.
    __device__ __forceinline__ Stage& begin_tile(float (&u)[2][QUAD], bool with_z) {
        Stage& now = stage();
        copy_wait<0>();
        __syncthreads();
        half = (int)sizeof(Stage) - half;
        rest -= SCAN_TILE;
        left -= SCAN_TILE;
        inputs.stage(stage(), rest);
        if (GATED && with_z) inputs.z.copy(stage().z, REDUCED ? left : rest);
        copy_commit();
        prepare(shared, now, quad, u);
        return now;
    }
    __device__ __forceinline__ void end_tile() {
        if (REDUCED)
            open.next_tile();
        else if (PARTIAL)
            partial.next_tile();
        else
            out.next_tile();
    }

    __device__ __forceinline__ void save(const float (&y)[2][QUAD]) {
        saved.write(y, quad);
        saved.next_tile();
    }

    // `tiles` full tiles; with a reduction they are all of one pool, which is kept.
    __device__ __forceinline__ void run_kept(int tiles) {
#pragma unroll 1
        for (const int end = rest - tiles * SCAN_TILE; rest > end;) {
            float u[2][QUAD], y[2][QUAD];
            uint4 entries[2];
            const Stage& now = begin_tile(u, true);
            if (REDUCED) open.load(entries);
            __syncthreads();
            advance_tile<true, SCAN_TILE>(h, A, shared, lane);
            __syncthreads();
            finish(y, shared, u, quad);
            if (SAVE_Y) save(y);
            if (GATED) gate(y, now, quad);
            if (REDUCED)
                open.add(y, entries);
            else if (PARTIAL)
                partial.write(y, quad);
            else
                out.write(y, quad);
            end_tile();
        }
    }
    // `tiles` full tiles of a pool that sampling drops: the states only.
    __device__ __forceinline__ void run_dropped(int tiles) {
#pragma unroll 1
        for (const int end = rest - tiles * SCAN_TILE; rest > end;) {
            float u[2][QUAD];
            begin_tile(u, false);
            __syncthreads();
            advance_tile<false, SCAN_TILE>(h, A, shared, lane);
            end_tile();
        }
    }

    // Saves y of the kept ones of the tile's first `tokens` tokens.
    __device__ __forceinline__ void save_first(const float (&y)[2][QUAD], int tokens) {
        if (!REDUCED) saved.write_first(y, quad, tokens);
        for (int j = 0; REDUCED && j < 2 && quad.token + j < tokens; j++) {
            const int kept = a.p.map[s.token(position + quad.token + j)].kept;
            for (int c = 0; c < QUAD; c++)
                if (kept >= 0 && c < quad.channels)
                    y_rows[kept * a.p.channels + s.channel + quad.channel + c] = y[j][c];
        }
    }

    // Any one tile: at the sequence's end and, with a reduction, where two pools meet or where threads
    // might meet in a cell.
    __device__ __forceinline__ void run_any() {
        const int tokens = (int)smaller(s.length - position, SCAN_TILE);
        float u[2][QUAD], y[2][QUAD];
        Stage& now = begin_tile(u, !REDUCED);
        stand_still(shared, quad, tokens);
        if (GATED && REDUCED) load_kept(now.z, a.p, s, position, tokens);
        __syncthreads();
        advance_tile<true, 1>(h, A, shared, lane);
        __syncthreads();
        finish(y, shared, u, quad);
        if (SAVE_Y) save_first(y, tokens);
        if (GATED) gate(y, now, quad);
        if (REDUCED)
            open.add_each(y, shared, a.p.map + s.token(position), quad, tokens, reduced, a.p, s);
        else if (PARTIAL)
            partial.write_first(y, quad, tokens);
        else
            out.write_first(y, quad, tokens);
        end_tile();
        left = 0;
    }

    // Enters the pool of the next token: opens its sums and asks for the rows of z.
    __device__ __forceinline__ void enter_pool() {
        const TokenEntry next = a.p.map[s.token(position)];
        const int into = next.token % (int)a.pool_tokens;
        left = (int)smaller(s.reverse ? into + 1 : a.pool_tokens - into, s.length - position);
        dropped = next.cell < 0;
        if (dropped) return;
        open.open(reduced, a.p, s, quad, next.cell);
        if (!GATED) return;
        if (SAVE_Y) saved.seek(y_rows + next.kept * a.p.channels, s, quad);
        inputs.z.seek(a.p.z + s.batch * a.p.z_batch + s.channel + (a.p.z_kept ? next.kept : next.token) * a.p.z_row);
        copy_wait<0>();  // zeros are under way to the same place if the pool before ended with its tile
        inputs.z.copy(stage().z, left);
        copy_commit();
    }

    // Asks for the first tile's inputs.
    __device__ __forceinline__ void begin() {
        rest = (int)smaller(s.length, FAR);
        inputs.stage(stage(), rest);
        if (GATED && !REDUCED) inputs.z.copy(stage().z, rest);
        copy_commit();
    }
    // Goes on with the sums of a pool that the step before left open.
    __device__ __forceinline__ void resume() {
        const int cell = a.p.map[s.token(0)].cell;
        if (a.cells && cell >= 0) open.resume(reduced, a.p, s, quad, cell, a.p.map[s.token(-1)].cell);
    }
    __device__ __forceinline__ void run() {
        while (position < s.length) {
            if (d.checkpoints && position % INTERVAL == 0)
                store_states(h,
                    d.checkpoints + ((checkpoint + position / INTERVAL) * a.p.channels + s.channel) * D_STATE, place,
                    s.channels);
            if (REDUCED && a.pool_tokens && left == 0) enter_pool();
            rest = (int)smaller(s.length - position, FAR);
            const int tiles = (int)smaller(INTERVAL - position % INTERVAL, REDUCED ? left : rest) / SCAN_TILE;
            if (tiles == 0)
                run_any();
            else if (REDUCED && dropped)
                run_dropped(tiles);
            else
                run_kept(tiles);
            position += SCAN_TILE * (tiles ? tiles : 1);
        }
        copy_wait<0>();
        if (REDUCED) open.close(reduced, a.p, s);
    }
};

// The second bound is the blocks that a multiprocessor has room for. One more would take registers,
// and the compiler would spill: those of a reduction or, with other numbers of states, of any scan.
extern "C" __global__ void __launch_bounds__(THREADS, STATE_LANES == 4 && !REDUCED ? 3 : 2)
scan(const __grid_constant__ ScanArgs a) {
    DYNAMIC_SHARED(memory);
    Shared& shared = *(Shared*)memory;
    uint32 ticket = blockIdx.x;
    do {
        if (a.tickets.next) ticket = take(a.tickets, (uint32*)&shared.y);
        const uint32 step = ticket / (uint32)a.tickets.chains, chain = ticket % (uint32)a.tickets.chains;
        if (step >= a.tickets.steps) return;
        const int which = chain / (a.blocks * a.p.sequences);
        const Share whole = share_of(a.p, a.direction[which], chain / a.blocks % a.p.sequences, chain % a.blocks);
        const int64 first = step * a.tickets.step_tokens;
        if (step && first >= whole.length) continue;
        Scan scan(a, shared, which, part_of(whole, first, a.tickets.step_tokens),
            checkpoint_row(a.p, whole, first / INTERVAL));
        scan.begin();
        const int64 row = (scan.s.sequence * a.p.channels + scan.s.channel) * D_STATE;
        float* const states = a.states ? a.states + which * a.p.sequences * a.p.channels * D_STATE + row : nullptr;
        if (step) await_steps(a.tickets, chain, step);
        const float* initial = a.p.initial_state ? a.p.initial_state + row : nullptr;
        load_states(scan.h, step ? states : initial, scan.place, scan.s.channels);
        if (REDUCED && step) scan.resume();
        scan.run();
        if (states) store_states(scan.h, states, scan.place, scan.s.channels);
        if (a.tickets.next) hand_on(a.tickets, chain, step + 1);
    } while (a.tickets.next);
}
