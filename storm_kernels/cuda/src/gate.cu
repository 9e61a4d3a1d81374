// What goes over y beside the scans: the sum of both directions and its gate; the backward of the gate and of the token reduction.
// A block has a run of channels of TOKENS tokens, a thread QUAD channels of each of them.
// Defined by the launch code (gate.py): G_T (format of the result and of its gradient), Z_T; TOKENS; GATED, REDUCED; ALIGNED: every quad is whole and
// aligned as four.
#include "device.cuh"

constexpr int QUAD = 4;

struct Extent {
    int64 length;         // tokens of a batch row
    int64 channels;
    int64 runs;           // of tokens, a batch row
    int64 blocks;         // of channels
};

struct Quad {
    int64 batch, begin, channel;  // begin: its first token
    int tokens, channels;         // those that exist

    __device__ __forceinline__ explicit Quad(const Extent& of) {
        const uint32 run = blockIdx.x / (uint32)of.blocks;
        batch = run / (uint32)of.runs;
        begin = run % (uint32)of.runs * (int64)TOKENS;
        tokens = (int)smaller(TOKENS, of.length - begin);
        channel = (blockIdx.x % (uint32)of.blocks * THREADS + threadIdx.x) * QUAD;
        channels = (int)smaller(QUAD, of.channels - channel);
    }
    // `from`: of the quad's first channel; zero where there is no channel.
    template <typename T>
    __device__ __forceinline__ void load(float (&v)[QUAD], const T* from, int64 step = 1) const {
        if (ALIGNED) {
            load_quad(v, from);
        } else {
#pragma unroll
            for (int c = 0; c < QUAD; c++) v[c] = c < channels ? to_float(from[c * step]) : 0.0f;
        }
    }
    template <typename T>
    __device__ __forceinline__ void store(const float (&v)[QUAD], T* to) const {
        if (ALIGNED) {
            store_quad(v, to);
        } else {
#pragma unroll
            for (int c = 0; c < QUAD; c++)
                if (c < channels) from_float(v[c], to[c]);
        }
    }
};

struct MergeArgs {
    Extent extent;
    float* y;             // (batch, length, channels): of the first direction; receives the sum if it is to be kept
    const float* second;  // of the second
    int64 keep;
    const Z_T* z;         // with GATED
    int64 z_batch;
    int64 z_row;
    G_T* out;             // (batch, length, channels)
};

// out = (y + second) SiLU(z), with GATED; else y + second.
extern "C" __global__ void __launch_bounds__(THREADS) merge_directions(const __grid_constant__ MergeArgs a) {
    const Quad at(a.extent);
    if (at.channels <= 0) return;
    int64 own = (at.batch * a.extent.length + at.begin) * a.extent.channels + at.channel;
    const Z_T* gate = GATED ? a.z + at.batch * a.z_batch + at.begin * a.z_row + at.channel : nullptr;
#pragma unroll 1
    for (int left = at.tokens; left > 0; left--) {
        float y[QUAD], second[QUAD], z[QUAD] = {};
        at.load(y, a.y + own);
        at.load(second, a.second + own);
        if (GATED) at.load(z, gate);
#pragma unroll
        for (int c = 0; c < QUAD; c++) y[c] += second[c];
        if (a.keep) at.store(y, a.y + own);
#pragma unroll
        for (int c = 0; c < QUAD; c++)
            if (GATED) y[c] *= z[c] * sigmoid(z[c]);
        at.store(y, a.out + own);
        own += a.extent.channels;
        gate += a.z_row;
    }
}

struct GateBackwardArgs {
    Extent extent;
    const G_T* grad_out;
    int64 grad_out_batch;
    int64 grad_out_row;
    int64 grad_out_channel;
    const TokenEntry* map;  // with REDUCED
    const Z_T* z;           // with GATED, like y and dz
    int64 z_batch;
    int64 z_row;
    int64 z_kept;           // z and dz hold the kept tokens only
    int64 z_rows;           // of dz, a batch row
    const float* y;         // (batch, kept_rows, channels): before the gate
    const float* second;    // what is to be added to it, or null
    int64 kept_rows;
    float* gy;              // (batch, length, channels): dL/dy, zero for dropped tokens
    Z_T* dz;                // or null
};

// gy = w grad_out[cell] SiLU(z) and dz = w grad_out[cell] y SiLU'(z).
extern "C" __global__ void __launch_bounds__(THREADS) gate_backward(const __grid_constant__ GateBackwardArgs a) {
    const Quad at(a.extent);
    if (at.channels <= 0) return;
    const int64 width = a.extent.channels, first = at.batch * a.extent.length + at.begin, ahead = REDUCED ? 0 : at.begin;  // unreduced: rows in order
    const G_T* grad_out = a.grad_out + at.batch * a.grad_out_batch + at.channel * a.grad_out_channel + ahead * a.grad_out_row;
    const Z_T* gate = GATED ? a.z + at.batch * a.z_batch + at.channel + ahead * a.z_row : nullptr;
    int64 y_row = (at.batch * a.kept_rows + ahead) * width + at.channel, dz_row = (at.batch * a.z_rows + ahead) * width + at.channel;
    float* out = a.gy + first * width + at.channel;
    const TokenEntry* map = REDUCED ? a.map + at.begin : nullptr;
#pragma unroll 1
    for (int left = at.tokens; left > 0; left--) {
        float gy[QUAD] = {}, dz[QUAD] = {};
        TokenEntry entry = {};
        if (REDUCED) entry = *map++;
        const int z_row = a.z_kept ? entry.kept : entry.token;
        if (entry.cell >= 0) {
            float z[QUAD], y[QUAD], second[QUAD] = {};
            at.load(gy, grad_out + entry.cell * a.grad_out_row, a.grad_out_channel);
            if (GATED) {
                const int64 own = y_row + entry.kept * width;
                at.load(z, gate + z_row * a.z_row);
                at.load(y, a.y + own);
                if (a.second) at.load(second, a.second + own);
            }
#pragma unroll
            for (int c = 0; c < QUAD; c++) {
                if (REDUCED) gy[c] *= entry.weight;
                if (!GATED) continue;
                const float open = sigmoid(z[c]), part = gy[c] * open;
                gy[c] = part * z[c];
                dz[c] = (y[c] + second[c]) * fmaf(gy[c], 1.0f - open, part);
            }
        }
        at.store(gy, out);
        if (GATED && a.dz && z_row >= 0) at.store(dz, a.dz + dz_row + z_row * width);
        out += width;
        if (REDUCED) continue;
        grad_out += a.grad_out_row;
        gate += a.z_row;
        y_row += width;
        dz_row += width;
    }
}
