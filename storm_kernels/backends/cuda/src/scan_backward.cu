// Backward of the selective scan. A block takes a run of channels of one direction of one sequence
// through its intervals, from the last to the first. The states before each segment of an interval
// are recomputed from its checkpoint and saved in shared memory. Then, segment by segment from the
// end, states and decays are recomputed into registers and the adjoint runs back through them:
//
//     checkpoint -> | segment | segment | segment | segment |   states before each are saved
//                                         <-----    <-----      registers, adjoint
//
// With g = dL/dh and a = exp(delta A):
//     g_l = gy_l C_l + a_{l+1} g_{l+1};  du = delta (g . B) + D gy;
//     ddelta = u (g . B) + (g a h_{l-1}) . A;  dA += delta g a h_{l-1};
//     dB = sum over channels of g delta u;  dC = sum over channels of gy h.
// The channels of an elementwise step are those of the warp that computes it, so that only B, C and
// their gradients are shared between warps. Gate and reduction are behind dL/dy (gate.cu). The budget
// of issue slots is in tests/backends/test_cuda_backward.py. Nothing is added atomically: what
// several blocks contribute to goes to partial results, which `sum_terms` adds in order.
#include "gradient.cuh"

// One token for this thread's states: decay = exp(delta A), after = decay before + delta u B.
__device__ __forceinline__ void advance(const Shared& shared, float (&decay)[ITEMS], float (&after)[ITEMS],
    const float (&before)[ITEMS], const float (&A)[ITEMS], int t, const Offsets& at) {
    const float4 step = *(const float4*)past(shared.step[t], at.pair);
    float B[LANE_STATES];
    load_run(B, past(shared.B[BC_TILE == INTERVAL ? t : t % SEGMENT], at.states));
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const float rate = i < LANE_STATES ? step.x : step.y, input = i < LANE_STATES ? step.z : step.w;
        decay[i] = exp2_fast(rate * A[i]);
        after[i] = fmaf(decay[i], before[i], input * B[i % LANE_STATES]);
    }
}

// One token of the adjoint. `g` comes as g a of the token after it and leaves as its own. The
// thread's parts of the sums go to shared memory; `dA` is log2(e) times what it is named for.
__device__ __forceinline__ void retreat(Shared& shared, float (&g)[ITEMS], float (&dA)[ITEMS],
    const float (&A)[ITEMS], const float (&decay)[ITEMS], const float (&h)[ITEMS], const float (&before)[ITEMS],
    int t, int in_batch, const Offsets& at) {
    const float4 step = *(const float4*)past(shared.step[t], at.pair);
    const float2 gy = load_pair(past(shared.gy[in_batch], at.pair / 2));
    float B[LANE_STATES], C[LANE_STATES], BC[2 * LANE_STATES], gB[PAIR], gaA[PAIR];
    load_run(B, past(shared.B[BC_TILE == INTERVAL ? t : t % SEGMENT], at.states));
    load_run(C, past(shared.C[BC_TILE == INTERVAL ? t : t % SEGMENT], at.states));
#pragma unroll
    for (int c = 0; c < PAIR; c++) {
        const float rate = c ? step.y : step.x, input = c ? step.w : step.z, gradient = c ? gy.y : gy.x;
#pragma unroll
        for (int n = 0; n < LANE_STATES; n++) {
            const int i = c * LANE_STATES + n;
            const float gh = fmaf(gradient, C[n], g[i]);
            BC[n] = c ? fmaf(gh, input, BC[n]) : gh * input;
            BC[LANE_STATES + n] = c ? fmaf(gradient, h[i], BC[LANE_STATES + n]) : gradient * h[i];
            gB[c] = n ? fmaf(gh, B[n], gB[c]) : gh * B[n];
            g[i] = gh * decay[i];
            const float through = g[i] * before[i];
            gaA[c] = n ? fmaf(through, A[i], gaA[c]) : through * A[i];
            dA[i] = fmaf(through, rate, dA[i]);
        }
    }
    *(float4*)past(shared.channel[in_batch][0], at.own) = make_float4(gB[0], gB[1], gaA[0], gaA[1]);
#pragma unroll
    for (int r = 0; r < RUNS; r++)
        store_floats(past(&shared.warp[0].state[0][(in_batch * RUNS + r) * STATE_LANES * RUN], at.part), BC, r * RUN);
}

// The states before each of an interval's first `segments` segments, into shared memory. `h` comes as
// the checkpoint.
__device__ __forceinline__ void save_states(Shared& shared, const Strides& strides, const Share& s, const Offsets& at,
    const float (&A)[ITEMS], float (&h)[ITEMS], int64 begin, int segments) {
    float decay[ITEMS];
    for (int q = 0;; q++) {
#pragma unroll
        for (int r = 0; r < RUNS; r++) store_floats(past(shared.saved[q][r][0], at.own / (4 / RUN)), h, r * RUN);
        if (q == segments - 1) break;
        if (BC_TILE == SEGMENT) {
            __syncthreads();
            prepare_states(shared, strides, s, begin + q * SEGMENT);
            __syncthreads();
        }
#pragma unroll
        for (int t = 0; t < SEGMENT; t++) advance(shared, decay, h, h, A, q * SEGMENT + t, at);
    }
}

// Its beginning stays in one piece: functions of its own for `terms` or for the place of BC give the
// compiler another order of instructions, and not one register is to spare.
extern "C" __global__ void __launch_bounds__(THREADS, 2) scan_backward(const __grid_constant__ BackwardArgs a) {
    DYNAMIC_SHARED(memory);
    Shared& shared = *(Shared*)memory;
    const int64 work = blockIdx.x;
    const int which = work / (a.blocks * a.p.sequences);
    const Direction& d = a.direction[which];
    const Gradients& grad = a.gradients[which];
    const Share s = share_of(a.p, d, work / a.blocks % a.p.sequences, work % a.blocks);
    const Place place;
    const Offsets at(place);
    const int64 state_row = (s.sequence * a.p.channels + s.channel) * D_STATE;

    const int64 last = (s.length - 1) / INTERVAL * INTERVAL;
    const Strides& strides = a.strides[which];
    // Batches of the interval before the present one
    int batches = (int)((s.length - last + SEGMENT - 1) / SEGMENT) * (SEGMENT / BATCH) - 1;
    Elements e(a, d, grad, s, place, last + batches * BATCH);
    const bool owns = STATE_LANES <= BATCH || e.token < BATCH;  // an element of each batch
    const int64 BC_row = a.groups * 2 * D_STATE, batch_rows = a.p.length * (a.p.cu_seqlens ? 1 : a.p.sequences);
    const int piece = threadIdx.x * PIECE, piece_token = piece / (2 * STATES), BC_step = s.reverse ? -BC_row : BC_row;
    const int64 BC_first = s.block % a.p.group_blocks * batch_rows + s.batch * a.p.length +
                           s.token(last + (batches + 1) * BATCH - SEGMENT + piece_token);
    Column<float> BC =
        column(grad.BC, BC_first * BC_row + s.group * 2 * D_STATE + piece / STATES % 2 * D_STATE + piece % STATES);

    float A[ITEMS], g[ITEMS];
    const SumsOfA dA_sums(a, work);
    const float* checkpoint =
        d.checkpoints + (checkpoint_row(a.p, s, last / INTERVAL) * a.p.channels + s.channel + place.channel) * D_STATE;
    load_states(A, d.A + s.channel * D_STATE, place, s.channels);
    load_states(g, a.grad_final_state ? a.grad_final_state + state_row : nullptr, place, s.channels);
    dA_sums.clear();
    for (int c = threadIdx.x; c < BLOCK_CHANNELS; c += THREADS) {
        shared.terms[term_at(0, c)] = c < s.channels && d.delta_bias ? d.delta_bias[s.channel + c] : 0.0f;
        shared.terms[term_at(1, c)] = c < s.channels && d.D ? d.D[s.channel + c] : 0.0f;
    }
    if (threadIdx.x == 0) {
        shared.B_rows = d.B + s.batch * d.B_batch + s.token(0) * d.B_row + s.group * d.B_group;
        shared.C_rows = d.C + s.batch * d.C_batch + s.token(0) * d.C_row + s.group * d.C_group;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < PAIR; c++) shared.dD[c][threadIdx.x] = shared.dbias[c][threadIdx.x] = Sum();

    for (int64 begin = last; begin >= 0 && s.length > 0; begin -= INTERVAL) {
        const int left = (int)smaller(INTERVAL, s.length - begin), segments = (left + SEGMENT - 1) / SEGMENT;
        float dA[ITEMS] = {};
        float(&rows)[2 * PAIR] = shared.row_sums[threadIdx.x];
        *(float4*)rows = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        e.set_limit(left);
        prepare_steps(shared, e, at, strides, batches);
        if (BC_TILE == INTERVAL) prepare_states(shared, strides, s, begin);
        __syncthreads();
        Element x;
        if (owns) x.request_gradient(e, batches * BATCH);
        float start[ITEMS];
        load_checkpoint(start, checkpoint, place.state, e.channels);
        checkpoint -= a.p.channels * D_STATE;
        save_states(shared, strides, s, at, A, start, begin, segments);
        for (int q = segments - 1; q >= 0; q--) {
            if (BC_TILE == SEGMENT) {
                __syncthreads();
                prepare_states(shared, strides, s, begin + q * SEGMENT);
                __syncthreads();
            }
            float h[SEGMENT + 1][ITEMS], decay[SEGMENT][ITEMS];
#pragma unroll
            for (int r = 0; r < RUNS; r++)
                load_floats(h[0], r * RUN, past(shared.saved[q][r][0], at.own / (4 / RUN)));
#pragma unroll
            for (int t = 0; t < SEGMENT; t++) advance(shared, decay[t], h[t + 1], h[t], A, q * SEGMENT + t, at);
#pragma unroll
            for (int b = SEGMENT - BATCH; b >= 0; b -= BATCH) {
                const int t = q * SEGMENT + b;
                if (owns) {
                    *(float2*)past(shared.gy[0], at.step / 2) = unpacked(x.gy);
                    x.request_inputs(e, t);
                    e.gy.move(-strides.gy);
                    x.request_gradient(e, t - BATCH);
                }
                __syncwarp();
#pragma unroll
                for (int k = BATCH - 1; k >= 0; k--)
                    retreat(shared, g, dA, A, decay[b + k], h[b + k + 1], h[b + k], q * SEGMENT + b + k, k, at);
                __syncwarp();
                if (owns) write_gradients(shared, e, x, at, t);
                e.to_last_batch(strides, -1);
                add_channels(shared, at, b);
            }
            __syncthreads();
            write_states(shared, at, BC.now, BC_step, left - q * SEGMENT);
            BC.move(-strides.BC);
            __syncthreads();
        }
        float values[ITEMS], errors[ITEMS];
        dA_sums.load(values, errors);
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            Sum sum{values[i], errors[i]};
            sum.add(dA[i]);
            values[i] = sum.value;
            errors[i] = sum.lost;
        }
        dA_sums.store(values, errors);
        batches = INTERVAL / BATCH - 1;
#pragma unroll
        for (int c = 0; c < PAIR; c++) {
            shared.dD[c][threadIdx.x].add(rows[c]);
            shared.dbias[c][threadIdx.x].add(rows[PAIR + c]);
        }
    }
    if (a.grad_initial_state) store_states(g, a.grad_initial_state + state_row, place, s.channels);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) A[i] = LN2 * dA_sums.value(i);
    if (grad.A) store_states(A, grad.A + state_row, place, s.channels);
    write_row_gradients(shared, grad, e, a.p, s);
}
