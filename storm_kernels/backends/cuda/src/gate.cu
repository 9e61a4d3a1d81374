// What is done to y outside the scans: the sum of two directions and its gate; the backward of the
// gate and of the token reduction.
//
//     a block                GATE_TILE tokens x (THREADS x WIDTH) channels
//     one of its threads     each of these tokens, WIDTH channels beside each other
//
// The launch code (gate.py) defines G_T (number format of the result and of its gradient), Z_T;
// GATE_TILE, WIDTH; GATED, REDUCED; SUMMED: y is the sum of two directions; ALIGNED: every thread's
// channels exist and begin on 16 bytes.
#include "device.cuh"

struct Extent {
    int64 length;         // tokens of a batch row
    int64 channels;
    int64 tiles;          // of tokens, a batch row
    int64 blocks;         // of channels
};

__device__ __forceinline__ void load_aligned(float (&v)[WIDTH], const float* x) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
        const float4 four = *(const float4*)(x + i);
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
}
template <typename T>
__device__ __forceinline__ void load_aligned(float (&v)[WIDTH], const T* x) {
    const uint4 bits = *(const uint4*)x;
    unpack(v[0], v[1], bits.x, T());
    unpack(v[2], v[3], bits.y, T());
    unpack(v[4], v[5], bits.z, T());
    unpack(v[6], v[7], bits.w, T());
}
__device__ __forceinline__ void store_aligned(const float (&v)[WIDTH], float* x) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) *(float4*)(x + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}
template <typename T>
__device__ __forceinline__ void store_aligned(const float (&v)[WIDTH], T* x) {
    *(uint4*)x = make_uint4(packed(make_float2(v[0], v[1]), T()), packed(make_float2(v[2], v[3]), T()),
        packed(make_float2(v[4], v[5]), T()), packed(make_float2(v[6], v[7]), T()));
}

// A thread's share. Rows are counted from the batch row's first; from a row to the next there are
// less than 2^31 bytes.
struct Strip {
    int64 batch, channel;
    int begin, end, channels;  // first token, token after the last; how many channels exist

    __device__ __forceinline__ explicit Strip(const Extent& of) {
        const uint32 tile = blockIdx.x / (uint32)of.blocks;
        batch = tile / (uint32)of.tiles;
        begin = (int)(tile % (uint32)of.tiles) * GATE_TILE;
        end = (int)smaller(begin + GATE_TILE, of.length);
        channel = (int64)(blockIdx.x % (uint32)of.blocks * THREADS + threadIdx.x) * WIDTH;
        channels = (int)smaller(WIDTH, of.channels - channel);
    }
    // `array` is row 0's channel. Zero where there is no channel.
    template <typename T>
    __device__ __forceinline__ void load(
        float (&v)[WIDTH], const T* array, int row, int64 bytes, int64 channel_step = 1) const {
        const T* from = row_at(array, row, (int)bytes);
        if (ALIGNED) {
            load_aligned(v, from);
        } else {
#pragma unroll
            for (int c = 0; c < WIDTH; c++) v[c] = c < channels ? to_float(from[c * channel_step]) : 0.0f;
        }
    }
    template <typename T>
    __device__ __forceinline__ void store(const float (&v)[WIDTH], T* array, int row, int64 bytes) const {
        T* to = row_at(array, row, (int)bytes);
        if (ALIGNED) {
            store_aligned(v, to);
        } else {
#pragma unroll
            for (int c = 0; c < WIDTH; c++)
                if (c < channels) from_float(v[c], to[c]);
        }
    }
};

struct MergeArgs {
    Extent extent;
    float* y;             // (batch, length, channels): of the first direction
    const float* second;  // of the second
    int64 save_y;         // whether `y` receives the sum
    const Z_T* z;         // with GATED
    int64 z_batch;        // elements
    int64 z_row;          // bytes
    G_T* out;             // (batch, length, channels)
};

// out = (y + second) SiLU(z), with GATED; else y + second.
extern "C" __global__ void __launch_bounds__(THREADS) merge_directions(const __grid_constant__ MergeArgs a) {
    const Strip at(a.extent);
    if (at.channels <= 0) return;
    const int64 width = a.extent.channels, first = at.batch * a.extent.length * width + at.channel;
    float* const sums = a.y + first;
    const float* const others = a.second + first;
    G_T* const out = a.out + first;
    const Z_T* const gate = GATED ? a.z + at.batch * a.z_batch + at.channel : nullptr;
#pragma unroll 1
    for (int t = at.begin; t < at.end; t++) {
        float y[WIDTH], second[WIDTH], z[WIDTH];
        at.load(y, sums, t, width * sizeof(float));
        at.load(second, others, t, width * sizeof(float));
        if (GATED) at.load(z, gate, t, a.z_row);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) y[c] += second[c];
        if (a.save_y) at.store(y, sums, t, width * sizeof(float));
#pragma unroll
        for (int c = 0; c < WIDTH; c++)
            if (GATED) y[c] *= z[c] * sigmoid(z[c]);
        at.store(y, out, t, width * sizeof(G_T));
    }
}

struct GateBackwardArgs {
    Extent extent;
    const G_T* grad_out;
    int64 grad_out_batch;   // elements
    int64 grad_out_row;     // bytes
    int64 grad_out_channel; // elements
    const TokenEntry* map;  // with REDUCED
    const Z_T* z;           // with GATED, like y and dz
    int64 z_batch;          // elements
    int64 z_row;            // bytes
    int64 z_kept;           // whether z and dz hold the kept tokens only
    int64 z_rows;           // of dz, a batch row
    const float* y;         // (batch, kept_rows, channels): before the gate
    const float* second;    // with SUMMED: the other direction's
    int64 kept_rows;        // kept tokens of a batch row
    float* gy;              // (batch, length, channels): dL/dy, zero for dropped tokens
    Z_T* dz;
};

// gy = w grad_out[cell] SiLU(z) and dz = w grad_out[cell] y SiLU'(z), w one over the tokens of the cell.
// Eight blocks a multiprocessor: else the compiler aims at more, and spills or keeps fewer loads in
// flight.
extern "C" __global__ void __launch_bounds__(THREADS, 8) gate_backward(const __grid_constant__ GateBackwardArgs a) {
    const Strip at(a.extent);
    if (at.channels <= 0) return;
    const int64 width = a.extent.channels, y_first = at.batch * a.kept_rows * width + at.channel;
    const G_T* const grad_out = a.grad_out + at.batch * a.grad_out_batch + at.channel * a.grad_out_channel;
    float* const out = a.gy + at.batch * a.extent.length * width + at.channel;
    const Z_T* const gate = GATED ? a.z + at.batch * a.z_batch + at.channel : nullptr;
    Z_T* const gate_out = GATED ? a.dz + at.batch * a.z_rows * width + at.channel : nullptr;
    const float* const y_rows = GATED ? a.y + y_first : nullptr;
    const float* const second_rows = SUMMED ? a.second + y_first : nullptr;
#pragma unroll 1
    for (int t = at.begin; t < at.end; t++) {
        TokenEntry entry = {t, t, 1.0f, t};
        if (REDUCED) entry = a.map[t];
        const int z_row = a.z_kept ? entry.kept : entry.token;
        if (REDUCED && entry.cell < 0) {
            const float zeros[WIDTH] = {};
            at.store(zeros, out, t, width * sizeof(float));
            if (GATED && z_row >= 0) at.store(zeros, gate_out, z_row, width * sizeof(Z_T));
            continue;
        }
        float gy[WIDTH], z[WIDTH], y[WIDTH], second[WIDTH], dz[WIDTH];
        at.load(gy, grad_out, entry.cell, a.grad_out_row, a.grad_out_channel);
        if (GATED) at.load(z, gate, z_row, a.z_row);
        if (GATED) at.load(y, y_rows, entry.kept, width * sizeof(float));
        if (SUMMED) at.load(second, second_rows, entry.kept, width * sizeof(float));
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            if (REDUCED) gy[c] *= entry.weight;
            if (!GATED) continue;
            const float open = sigmoid(z[c]), part = gy[c] * open;
            gy[c] = part * z[c];
            dz[c] = (SUMMED ? y[c] + second[c] : y[c]) * fmaf(gy[c], 1.0f - open, part);
        }
        at.store(gy, out, t, width * sizeof(float));
        if (GATED) at.store(dz, gate_out, z_row, width * sizeof(Z_T));
    }
}
