// Causal depthwise convolution over time with SiLU, forward and backward; a forward and a reverse
// filter read x once. A thread owns one channel and slides along the CONV_TILE tokens of a tile with
// the inputs that it needs in registers, its window. With 3 taps and two filters, at token l:
//
//     window             l-2  l-1   l   l+1  l+2
//     forward filter     [0]  [1]  [2]                 index into its weights
//     reverse filter               [2]  [1]  [0]
//
// So for either filter the output at a token is the bias plus the sum over d of weight[TAPS - 1 - d]
// times the input d steps before the token in scan order.
//
// The launch code (conv.py) defines X_T (number format); TAPS; FORWARD, REVERSE: whether there is
// such a filter, 1 or 0; PACKED; CONV_TILE.
#include "device.cuh"

constexpr int HALO = TAPS - 1;
// Those there are of filter 0, the forward one, and filter 1, the reverse one
constexpr int FIRST = FORWARD ? 0 : 1, LAST = REVERSE ? 1 : 0;

struct Filter {
    const float* weight;  // (channels, TAPS)
    const float* bias;    // (channels,) or null
    X_T* out;             // forward: (batch, length, channels)
    const X_T* grad;      // backward: gradient of `out`
    int64 grad_batch;
    int64 grad_row;
    int64 grad_channel;
    float* partial;       // backward: (batch, tiles, TAPS + 1, channels), gradients of weight and bias, or null
};

struct ConvArgs {
    Filter filter[2];
    const X_T* x;
    int64 x_batch;
    int64 x_row;
    int64 batch;
    int64 length;
    int64 channels;
    int64 channel_blocks;
    int64 tiles;
    int64 silu;
    int64 sequences;
    const int64* cu_seqlens;     // with PACKED
    const float* initial_state;  // (sequences, channels, TAPS - 1) or null
    X_T* grad_x;
    float* grad_initial_state;
};

// The sequence that a token belongs to, for tokens that only move forward.
struct Cursor {
    int64 sequence, start, end;

    __device__ __forceinline__ Cursor(const ConvArgs& a, int64 batch) : sequence(batch), start(0), end(a.length) {
        if (PACKED) {
            sequence = 0;
            end = a.cu_seqlens[1];
        }
    }
    // By halving: the first token of a tile may lie in any sequence.
    __device__ __forceinline__ void find(const ConvArgs& a, int64 token) {
        int64 low = 0, high = a.sequences - 1;
        while (low < high) {
            int64 middle = (low + high) / 2;
            if (a.cu_seqlens[middle + 1] > token)
                high = middle;
            else
                low = middle + 1;
        }
        sequence = low;
        start = a.cu_seqlens[low];
        end = a.cu_seqlens[low + 1];
    }
    __device__ __forceinline__ void move(const ConvArgs& a, int64 token) {
        if (PACKED && (token < start || token >= end)) find(a, token);
    }
};

struct Column {
    const ConvArgs& a;
    int64 batch, channel;

    __device__ __forceinline__ float x(int64 token) const {
        return token >= 0 && token < a.length ? to_float(a.x[batch * a.x_batch + token * a.x_row + channel]) : 0.0f;
    }
    // The input at `token` as the sequence under `at` sees it, given what memory holds there:
    // outside, the initial state or zero.
    __device__ __forceinline__ float seen(const Cursor& at, int64 token, float inside) const {
        if (token >= at.start && token < at.end) return inside;
        int64 outside = token < at.start ? at.start - 1 - token : token - at.end;
        return a.initial_state && outside < HALO
                   ? a.initial_state[(at.sequence * a.channels + channel) * HALO + HALO - 1 - outside]
                   : 0.0f;
    }
};

__device__ __forceinline__ void load_filter(const Filter& f, int64 channel, float (&weight)[TAPS], float& bias) {
#pragma unroll
    for (int i = 0; i < TAPS; i++) weight[i] = f.weight[channel * TAPS + i];
    bias = f.bias ? f.bias[channel] : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS) conv(const __grid_constant__ ConvArgs a) {
    const int64 work = blockIdx.x;
    const int64 channel = work % a.channel_blocks * THREADS + threadIdx.x, tile = work / a.channel_blocks % a.tiles;
    if (channel >= a.channels) return;
    const Column column{a, work / a.channel_blocks / a.tiles, channel};
    constexpr int BEHIND = FORWARD ? HALO : 0, AHEAD = REVERSE ? HALO : 0;

    float weight[2][TAPS], bias[2], window[BEHIND + 1 + AHEAD];  // window[i] is the input at token - BEHIND + i
#pragma unroll
    for (int f = FIRST; f <= LAST; f++) load_filter(a.filter[f], channel, weight[f], bias[f]);
    const int64 begin = tile * CONV_TILE, end = smaller(begin + CONV_TILE, a.length);
#pragma unroll
    for (int i = 0; i < BEHIND + AHEAD; i++) window[i + 1] = column.x(begin - BEHIND + i);
    Cursor at(a, column.batch);
#pragma unroll 8
    for (int64 l = begin; l < end; l++) {
#pragma unroll
        for (int i = 0; i < BEHIND + AHEAD; i++) window[i] = window[i + 1];
        window[BEHIND + AHEAD] = column.x(l + AHEAD);
        at.move(a, l);
#pragma unroll
        for (int f = FIRST; f <= LAST; f++) {
            float sum = bias[f];
#pragma unroll
            for (int d = HALO; d >= 0; d--) {
                int step = f ? d : -d;
                sum = fmaf(weight[f][HALO - d], column.seen(at, l + step, window[BEHIND + step]), sum);
            }
            if (a.silu) sum *= sigmoid_close(sum);
            from_float(sum, a.filter[f].out[(column.batch * a.length + l) * a.channels + channel]);
        }
    }
}

// The gradient before SiLU at a token, from the gradient of the output there. inputs[d] is the input d
// steps before the token in scan order.
__device__ __forceinline__ float before_silu(
    const ConvArgs& a, const float (&weight)[TAPS], float bias, const float (&inputs)[TAPS], float grad) {
    if (!a.silu) return grad;
    float sum = bias;
#pragma unroll
    for (int d = HALO; d >= 0; d--) sum = fmaf(weight[HALO - d], inputs[d], sum);
    float open = sigmoid_close(sum);
    return grad * open * fmaf(sum, 1.0f - open, 1.0f);
}

__device__ __forceinline__ float output_gradient(
    const ConvArgs& a, const Filter& f, const Column& column, int64 token) {
    return to_float(f.grad[column.batch * f.grad_batch + token * f.grad_row + column.channel * f.grad_channel]);
}

// At step l the window holds the inputs of tokens l ... l + HALO: what the reverse filter's output
// at l and the forward filter's at l + HALO read. dx[l] then needs the forward gradients of
// l ... l + HALO and the reverse ones of l - HALO ... l, which are kept as they come.
extern "C" __global__ void __launch_bounds__(THREADS) conv_backward(const __grid_constant__ ConvArgs a) {
    const int64 work = blockIdx.x;
    const int64 channel = work % a.channel_blocks * THREADS + threadIdx.x, tile = work / a.channel_blocks % a.tiles;
    if (channel >= a.channels) return;
    const Column column{a, work / a.channel_blocks / a.tiles, channel};

    float weight[2][TAPS], bias[2], window[TAPS], arrived[2][TAPS];
    Sum sums[2][TAPS + 1];
#pragma unroll
    for (int f = FIRST; f <= LAST; f++) {
        load_filter(a.filter[f], channel, weight[f], bias[f]);
#pragma unroll
        for (int i = 0; i < TAPS; i++) arrived[f][i] = 0.0f;
    }
    const int64 begin = tile * CONV_TILE, end = smaller(begin + CONV_TILE, a.length);
#pragma unroll
    for (int i = 0; i < HALO; i++) window[i + 1] = column.x(begin - HALO + i);
    Cursor here(a, column.batch), ahead(a, column.batch);
#pragma unroll 4
    for (int64 l = begin - HALO; l < end; l++) {
#pragma unroll
        for (int i = 0; i < HALO; i++) window[i] = window[i + 1];
        window[HALO] = column.x(l + HALO);
        here.move(a, l < 0 ? 0 : l);
        ahead.move(a, smaller(l + HALO, a.length - 1));
#pragma unroll
        for (int f = FIRST; f <= LAST; f++) {
            const Cursor& at = f ? here : ahead;
            const int64 token = f ? l : l + HALO;
            float inputs[TAPS], grad = 0.0f;
#pragma unroll
            for (int d = 0; d < TAPS; d++)
                inputs[d] = column.seen(at, f ? token + d : token - d, window[f ? d : HALO - d]);
            if (token >= 0 && token < a.length)
                grad = before_silu(a, weight[f], bias[f], inputs, output_gradient(a, a.filter[f], column, token));
#pragma unroll
            for (int i = 0; i < HALO; i++) arrived[f][i] = arrived[f][i + 1];
            arrived[f][HALO] = grad;
            if (token >= begin && token < end) {
#pragma unroll
                for (int d = 0; d < TAPS; d++) sums[f][HALO - d].add(grad * inputs[d]);
                sums[f][TAPS].add(grad);
            }
        }
        if (l < begin || !a.grad_x) continue;
        float dx = 0.0f;
#pragma unroll
        for (int f = FIRST; f <= LAST; f++)
#pragma unroll
            for (int d = 0; d < TAPS; d++) {
                int64 token = f ? l - d : l + d;
                if (token >= here.start && token < here.end)
                    dx = fmaf(weight[f][HALO - d], arrived[f][f ? HALO - d : d], dx);
            }
        from_float(dx, a.grad_x[(column.batch * a.length + l) * a.channels + channel]);
    }
#pragma unroll
    for (int f = FIRST; f <= LAST; f++)
        if (a.filter[f].partial)
#pragma unroll
            for (int i = 0; i <= TAPS; i++)
                a.filter[f].partial[((column.batch * a.tiles + tile) * (TAPS + 1) + i) * a.channels + channel] =
                    sums[f][i].value;
}

// Gradient of the initial state, which reaches the first HALO outputs of its sequence. A thread has a
// channel of one sequence; there is one filter.
extern "C" __global__ void __launch_bounds__(THREADS) conv_state_backward(const __grid_constant__ ConvArgs a) {
    constexpr int f = FIRST;
    const int64 work = (int64)blockIdx.x * THREADS + threadIdx.x, sequence = work / a.channels;
    if (sequence >= a.sequences) return;
    const Column column{a, PACKED ? 0 : sequence, work % a.channels};
    Cursor at(a, column.batch);
    at.sequence = sequence;
    if (PACKED) {
        at.start = a.cu_seqlens[sequence];
        at.end = a.cu_seqlens[sequence + 1];
    }
    float weight[TAPS], bias, grads[HALO + 1];
    load_filter(a.filter[f], column.channel, weight, bias);
#pragma unroll
    for (int t = 0; t < HALO; t++) {
        grads[t] = 0.0f;
        int64 token = f ? at.end - 1 - t : at.start + t;
        if (t >= at.end - at.start) continue;
        float inputs[TAPS];
#pragma unroll
        for (int d = 0; d < TAPS; d++) {
            int64 from = f ? token + d : token - d;
            inputs[d] = column.seen(at, from, column.x(from));
        }
        grads[t] = before_silu(a, weight, bias, inputs, output_gradient(a, a.filter[f], column, token));
    }
#pragma unroll
    for (int q = 0; q < HALO; q++) {  // entry q lies HALO - q steps before the first token
        float sum = 0.0f;
#pragma unroll
        for (int t = 0; t < HALO; t++)
            if (t <= q) sum = fmaf(weight[q - t], grads[t], sum);
        a.grad_initial_state[(sequence * a.channels + column.channel) * HALO + q] = sum;
    }
}
