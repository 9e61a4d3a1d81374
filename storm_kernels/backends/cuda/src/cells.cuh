// Sums of a reduction. The frames of a pool follow each other in either direction, so a block sums
// one pool at a time, in shared memory behind `Shared`:
//
//     sums[cell of the pool: H' W' of them][channel of the block]
//
// When the next pool begins, the sums are complete and are written. A pool whose sums are in shared
// memory is open.
#pragma once
#include "tile.cuh"

struct Reduced {
    float* partial;  // (batch, L', channels) float32; begins as zeros if the sums do not fit in shared memory
    int cells;       // of a pool, H' W'; 0 if their sums do not fit in shared memory
};

struct OpenCells {
    static constexpr int ROW = BLOCK_CHANNELS * sizeof(float);
    float* sums;
    int begin;                // first cell of the open pool; far below 0 if none is open
    int own;                  // bytes from the sums to where cell 0 would have this thread's channels
    const TokenEntry* entry;  // of this thread's first token of the tile
    int64 next, step;         // bytes to the next token's entry in scan order; to the next tile's

    __device__ __forceinline__ OpenCells(float* memory, const Problem& p, const Share& s, const Quad& at)
        : sums(memory), begin(-0x7fffffff - 1), own(0) {
        entry = REDUCED ? p.map + s.token(at.token) : nullptr;
        next = pinned((s.reverse ? -1 : 1) * (int64)sizeof(TokenEntry));
        step = pinned(next * SCAN_TILE);
    }

    __device__ __forceinline__ bool holds(int cell, const Reduced& r) const {
        return (uint32)cell - (uint32)begin < (uint32)r.cells;
    }

    // Writes the sums of the open pool, if one is open. Each thread writes those that it zeroed.
    __device__ __forceinline__ void close(const Reduced& r, const Problem& p, const Share& s) {
        __syncthreads();
        if (begin >= 0)
#pragma unroll 1
            for (int i = threadIdx.x; i < r.cells * BLOCK_CHANNELS; i += THREADS)
                if (i % BLOCK_CHANNELS < s.channels)
                    r.partial[(s.batch * p.out_rows + begin + i / BLOCK_CHANNELS) * p.channels + s.channel +
                              i % BLOCK_CHANNELS] = sums[i];
    }
    // Opens the pool of `cell`, unless it is open, in place of the one that is.
    __device__ __forceinline__ void open(const Reduced& r, const Problem& p, const Share& s, const Quad& at, int cell) {
        if (holds(cell, r)) return;
        close(r, p, s);
        begin = cell / r.cells * r.cells;
        own = (int)((uint32)at.channel * sizeof(float) - (uint32)begin * ROW);
#pragma unroll 1
        for (int i = threadIdx.x; i < r.cells * BLOCK_CHANNELS; i += THREADS) sums[i] = 0.0f;
        __syncthreads();
    }
    // Opens the pool of `cell` at the beginning of a step (tickets.cuh). If `before`, the cell of the
    // token before it, is of that pool too, goes on from the sums that the step before wrote.
    __device__ __forceinline__ void resume(
        const Reduced& r, const Problem& p, const Share& s, const Quad& at, int cell, int before) {
        open(r, p, s, at, cell);
        if (!holds(before, r)) return;
        const float* rows = r.partial + (s.batch * p.out_rows + begin) * p.channels + s.channel;
        const int piece = ASYNC ? 16 / sizeof(float) : 1;
#pragma unroll 1
        for (int i = threadIdx.x * piece; i < r.cells * BLOCK_CHANNELS; i += THREADS * piece) {
            const int channel = i % BLOCK_CHANNELS;
            if (channel >= s.channels) continue;
            const float* from = rows + i / BLOCK_CHANNELS * p.channels + channel;
            if (ASYNC)
                copy16_async(&sums[i], from, 16);
            else
                sums[i] = *from;
        }
        copy_commit();
        copy_wait<0>();
        __syncthreads();
    }

    // `load` and `add` are for a tile whose tokens are all of the open pool, and where no two threads
    // add to one cell.
    __device__ __forceinline__ void load(uint4 (&entries)[2]) const {
        entries[0] = *(const uint4*)entry;
        entries[1] = *(const uint4*)((const char*)entry + next);
    }
    __device__ __forceinline__ void add(const float (&y)[2][QUAD], const uint4 (&entries)[2]) {
        if (Quad::idle()) return;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float4& sum = *(float4*)past(sums, (int)((uint32)own + entries[j].x * ROW));
            const float weight = bits_to_float(entries[j].z);
            const float4 before = sum;
            sum = make_float4(fmaf(y[j][0], weight, before.x), fmaf(y[j][1], weight, before.y),
                fmaf(y[j][2], weight, before.z), fmaf(y[j][3], weight, before.w));
        }
    }

    __device__ __forceinline__ void next_tile() { entry = (const TokenEntry*)((const char*)entry + step); }

    // For any tile: token by token, each channel by one thread.
    __device__ __forceinline__ void add_each(const float (&y)[2][QUAD], Shared& shared, const TokenEntry* map,
        const Quad& at, int tokens, const Reduced& r, const Problem& p, const Share& s) {
        if (!at.idle())
            for (int k = 0; k < 2; k++)
                *past(&shared.y[0][0][0], at.part[k]) =
                    make_float4(y[0][2 * k], y[0][2 * k + 1], y[1][2 * k], y[1][2 * k + 1]);
        __syncthreads();
        int t = 0;
        do {
            const TokenEntry token = map[s.reverse ? -t : t];
            if (token.cell < 0) continue;
            if (r.cells) open(r, p, s, at, token.cell);
            float* row = &r.partial[(s.batch * p.out_rows + token.cell) * p.channels + s.channel];
            if (r.cells) row = &sums[(token.cell - begin) * BLOCK_CHANNELS];
            for (int c = threadIdx.x; c < s.channels; c += THREADS)
                row[c] = fmaf(
                    ((const float*)&shared.y[t / 2][0][pair_column(c / 2)])[t % 2 * 2 + c % 2], token.weight, row[c]);
        } while (++t < tokens);
    }
};
