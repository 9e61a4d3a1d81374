// Forward scan (docs/spec.md, Mixer): a block has a sequence, direction and run of channels, or a
// step of it (tickets.cuh); sequential in time, states in registers.
// A tile passes through four steps: its inputs arrive (stage.cuh, while the tile before is
// computed); delta and B, C are prepared in float32; the recurrence runs, each thread leaving its
// states' part of y; the parts are added, gated, reduced and written (tile.cuh, cells.cuh).
//
// Issue slots per channel, token and state in the loops over full tiles, counted in the machine
// code for sm_80, sm_90 and sm_100 by tests/backends/test_cuda_code.py (S = 16, softplus, rows of
// whole 16 bytes): both directions 7.2, to which gate.cu adds 0.4 for their sum and its gate; one
// with its gate 7.8; reduced 7.8, where y is saved for the backward 7.9; dropped frames 5.7. The
// budget is 8. The recurrence itself is 5.4 of them: 5 operations, one an exp2, and three loads and
// half a store per token for 8 items; softplus is 0.8, the gate 0.5. The exp2 unit is the limit
// before that: 8 cycles an item a scheduler, and 1.5 for the exponentials and reciprocals of
// softplus and gate.
#include "cells.cuh"
#include "tickets.cuh"

struct ScanArgs {
    Direction direction[2];
    Problem p;
    int64 blocks;        // channel blocks
    U_T* out;            // (batch, L', channels); with PARTIAL each direction writes its own `partial`
    float* partial[2];   // (batch, L', channels) float32; zeros if a reduction's sums do not fit in shared memory
    // With SAVE_Y: (batch, kept_rows, channels), before the gate, of the tokens that are kept, for
    // the backward
    float* y[2];
    int64 kept_rows;
    // (directions, sequences, channels, D_STATE): after the last token, until then after a step;
    // null if nobody reads them
    float* states;
    // H' W' with a reduction: cells that are open at a time, their sums in shared memory; 0 if they
    // do not fit
    int64 cells;
    int64 group_tokens;  // with a reduction: of a whole pooled group; 0 if its tiles are all to be unusual ones
    Tickets tickets;
};

// A block at work on its share.
struct Scan {
    const ScanArgs& a;
    const Direction& d;
    const Share s;
    const int64 checkpoint;  // its first row
    Shared& shared;
    const Place place;
    const Quad quad;
    const Lane lane;
    Inputs inputs;
    OutputRows<float> partial, saved;
    OutputRows<U_T> out;
    OpenCells open;
    const Reduced reduced;
    float* const y_rows;  // of its batch row
    float A[ITEMS], h[ITEMS];
    int64 position;  // of the tile that comes next
    int rest;        // tokens from there on, as many as matter
    int half;        // bytes to the half of the stage where its inputs are
    int left;        // with a reduction: tokens of its pooled group from there on, 0 if not known
    bool dropped;    // that group

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

    // Waits for the next tile's inputs, has those after it brought, and prepares the tile.
    __device__ __forceinline__ Stage& begin_tile(float (&u)[2][QUAD], bool with_z) {
        Stage& now = stage();
        copy_wait<0>();
        __syncthreads();
        half = (int)sizeof(Stage) - half;
        rest -= TILE;
        left -= TILE;
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

    // Full tiles, with a reduction all within one pooled group.
    __device__ __forceinline__ void run_kept(int tiles) {
#pragma unroll 1
        for (const int end = rest - tiles * TILE; rest > end;) {
            float u[2][QUAD], y[2][QUAD];
            uint4 entries[2];
            const Stage& now = begin_tile(u, true);
            if (REDUCED) open.load(entries);
            __syncthreads();
            advance_tile<true, TILE>(h, A, shared, lane);
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
    __device__ __forceinline__ void run_dropped(int tiles) {
#pragma unroll 1
        for (const int end = rest - tiles * TILE; rest > end;) {
            float u[2][QUAD];
            begin_tile(u, false);
            __syncthreads();
            advance_tile<false, TILE>(h, A, shared, lane);
            end_tile();
        }
    }

    __device__ __forceinline__ void save_some(const float (&y)[2][QUAD], int tokens) {
        if (!REDUCED) saved.write_some(y, quad, tokens);
        for (int j = 0; REDUCED && j < 2 && quad.token + j < tokens; j++) {
            const int kept = a.p.map[s.token(position + quad.token + j)].kept;
            for (int c = 0; c < QUAD; c++)
                if (kept >= 0 && c < quad.channels)
                    y_rows[kept * a.p.channels + s.channel + quad.channel + c] = y[j][c];
        }
    }

    // Any tile: the sequence's last tokens and, with a reduction, where pooled groups meet, or each
    // tile where its tokens may meet in a cell.
    __device__ __forceinline__ void run_unusual() {
        const int tokens = (int)smaller(s.length - position, TILE);
        float u[2][QUAD], y[2][QUAD];
        Stage& now = begin_tile(u, !REDUCED);
        stand_still(shared, quad, tokens);
        if (GATED && REDUCED) load_kept(now.z, a.p, s, position, tokens);
        __syncthreads();
        advance_tile<true, 1>(h, A, shared, lane);
        __syncthreads();
        finish(y, shared, u, quad);
        if (SAVE_Y) save_some(y, tokens);
        if (GATED) gate(y, now, quad);
        if (REDUCED)
            open.add_each(y, shared, a.p.map + s.token(position), quad, tokens, reduced, a.p, s);
        else if (PARTIAL)
            partial.write_some(y, quad, tokens);
        else
            out.write_some(y, quad, tokens);
        end_tile();
        left = 0;
    }

    // The pooled group of the token that comes next: its sums opened, its rows of z asked for.
    __device__ __forceinline__ void enter_group() {
        const TokenEntry next = a.p.map[s.token(position)];
        const int into = next.token % (int)a.group_tokens;
        left = (int)smaller(s.reverse ? into + 1 : a.group_tokens - into, s.length - position);
        dropped = next.cell < 0;
        if (dropped) return;
        open.open(reduced, a.p, s, quad, next.cell);
        if (!GATED) return;
        if (SAVE_Y) saved.seek(y_rows + next.kept * a.p.channels, s, quad);
        inputs.z.seek(a.p.z + s.batch * a.p.z_batch + s.channel + (a.p.z_kept ? next.kept : next.token) * a.p.z_row);
        copy_wait<0>();  // zeros are under way to the same place if the group before ended with its tile
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
    // If the step before left a pooled group open, its sums so far.
    __device__ __forceinline__ void resume() {
        const int cell = a.p.map[s.token(0)].cell;
        if (a.cells && cell >= 0) open.resume(reduced, a.p, s, quad, cell, a.p.map[s.token(-1)].cell);
    }
    __device__ __forceinline__ void run() {
        while (position < s.length) {
            if (d.checkpoints && position % CHUNK == 0)
                store_states(h, d.checkpoints + ((checkpoint + position / CHUNK) * a.p.channels + s.channel) * D_STATE,
                    place, s.channels);
            if (REDUCED && a.group_tokens && left == 0) enter_group();
            rest = (int)smaller(s.length - position, FAR);
            const int tiles = (int)smaller(CHUNK - position % CHUNK, REDUCED ? left : rest) / TILE;
            if (tiles == 0)
                run_unusual();
            else if (REDUCED && dropped)
                run_dropped(tiles);
            else
                run_kept(tiles);
            position += TILE * (tiles ? tiles : 1);
        }
        copy_wait<0>();
        if (REDUCED) open.close(reduced, a.p, s);
    }
};

// Blocks a multiprocessor: with the registers of one more the compiler spills some of a reduction's
// or, with other numbers of states, of any scan's.
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
            checkpoint_row(a.p, whole, first / CHUNK));
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
