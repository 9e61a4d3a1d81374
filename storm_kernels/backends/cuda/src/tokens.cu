// Small kernels over tokens: the map of a reduction, the reduction itself and its backward, and
// sums of partial results in fixed order. The launch code (tokens.py) defines IN_T and OUT_T (number
// formats).
//
// A reduction by example: 5 frames, temporal_pool 2, temporal_stride 2.
//
//     frame     0   1 | 2   3 | 4
//     pool        0   |   1   | 2      the last one has what is left
//     kept       yes  |  no   | yes    frames of H' W' cells each: 0 and 1
#include "device.cuh"

struct Reduction {
    int64 frames;
    int64 height;
    int64 width;
    int64 temporal_pool;
    int64 spatial_pool;
    int64 temporal_stride;
};

__device__ __forceinline__ int64 ceil_div(int64 a, int64 b) { return (a + b - 1) / b; }

// Members of pool `i`, where `total` members are cut into pools of `size`: the last one has what is
// left.
__device__ __forceinline__ int64 pool_members(int64 i, int64 size, int64 total) {
    return smaller(size, total - i * size);
}

struct MapArgs {
    Reduction r;
    TokenEntry* map;
};

// map[l] is the entry of token l.
extern "C" __global__ void __launch_bounds__(THREADS) token_map(const __grid_constant__ MapArgs a) {
    const Reduction& r = a.r;
    int64 l = (int64)blockIdx.x * THREADS + threadIdx.x;
    if (l >= r.frames * r.height * r.width) return;
    int64 frame = l / (r.height * r.width), inside = l % (r.height * r.width);
    int64 i = inside / r.width / r.spatial_pool, j = inside % r.width / r.spatial_pool, pool = frame / r.temporal_pool;
    bool kept = pool % r.temporal_stride == 0;
    int64 reduced_frame = pool / r.temporal_stride;
    int64 height = ceil_div(r.height, r.spatial_pool), width = ceil_div(r.width, r.spatial_pool);
    TokenEntry entry;
    entry.cell = kept ? (int)((reduced_frame * height + i) * width + j) : -1;
    entry.kept =
        kept ? (int)((reduced_frame * r.temporal_pool + frame % r.temporal_pool) * r.height * r.width + inside) : -1;
    entry.weight =
        1.0f / (float)(pool_members(pool, r.temporal_pool, r.frames) * pool_members(i, r.spatial_pool, r.height) *
                       pool_members(j, r.spatial_pool, r.width));
    entry.token = (int)l;
    a.map[l] = entry;
}

struct ReduceArgs {
    Reduction r;
    int64 batch;
    int64 channels;
    int64 cells;          // of a batch row
    const IN_T* in;
    int64 in_batch;
    int64 in_row;
    int64 in_channel;
    OUT_T* out;           // contiguous
    const TokenEntry* map;  // backward only
};

// (batch, T H W, channels) -> (batch, T' H' W', channels): the mean of each cell's tokens, in float32.
extern "C" __global__ void __launch_bounds__(THREADS) reduce_tokens(const __grid_constant__ ReduceArgs a) {
    const Reduction& r = a.r;
    int64 i = (int64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= a.batch * a.cells * a.channels) return;
    int64 c = i % a.channels, cell = i / a.channels % a.cells, b = i / a.channels / a.cells;
    int64 height = ceil_div(r.height, r.spatial_pool), width = ceil_div(r.width, r.spatial_pool);
    int64 pool = cell / (height * width) * r.temporal_stride, y = cell / width % height, x = cell % width;
    int64 frames = pool_members(pool, r.temporal_pool, r.frames), lines = pool_members(y, r.spatial_pool, r.height),
          columns = pool_members(x, r.spatial_pool, r.width);
    Sum sum;
    for (int64 f = 0; f < frames; f++)
        for (int64 k = 0; k < lines; k++)
            for (int64 m = 0; m < columns; m++) {
                int64 l = ((pool * r.temporal_pool + f) * r.height + y * r.spatial_pool + k) * r.width +
                          x * r.spatial_pool + m;
                sum.add(to_float(a.in[b * a.in_batch + l * a.in_row + c * a.in_channel]));
            }
    from_float(sum.value / (float)(frames * lines * columns), a.out[i]);
}

// Each token receives its cell's gradient divided by the cell's tokens, a dropped one zero.
extern "C" __global__ void __launch_bounds__(THREADS) reduce_tokens_backward(const __grid_constant__ ReduceArgs a) {
    int64 i = (int64)blockIdx.x * THREADS + threadIdx.x, length = a.r.frames * a.r.height * a.r.width;
    if (i >= a.batch * length * a.channels) return;
    int64 c = i % a.channels, l = i / a.channels % length, b = i / a.channels / length, cell = a.map[l].cell;
    from_float(
        cell < 0 ? 0.0f : a.map[l].weight * to_float(a.in[b * a.in_batch + cell * a.in_row + c * a.in_channel]),
        a.out[i]);
}

struct SumArgs {
    const IN_T* in;
    OUT_T* out;
    int64 outer;    // out is (outer, inner)
    int64 inner;
    int64 terms;
    int64 in_outer;  // strides of `in` over outer, terms, inner
    int64 in_term;
    int64 in_inner;
};

// out[o, i] = the sum over k of in[o, k, i], from the first term to the last.
extern "C" __global__ void __launch_bounds__(THREADS) sum_terms(const __grid_constant__ SumArgs a) {
    int64 i = (int64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= a.outer * a.inner) return;
    const IN_T* in = a.in + i / a.inner * a.in_outer + i % a.inner * a.in_inner;
    Sum sum;
    for (int64 k = 0; k < a.terms; k++) sum.add(to_float(in[k * a.in_term]));
    from_float(sum.value, a.out[i]);
}
