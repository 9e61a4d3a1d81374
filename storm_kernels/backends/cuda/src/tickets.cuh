// Work items of the forward scan. A chain is what one block computes in a static launch: a
// sequence, a direction and a run of channels. With tickets its tokens are cut into steps, and
// blocks take items in the order (step, chain) from a counter. An item waits for its chain's step
// before, which has a lower ticket: the lowest ticket at work never waits, so there is no deadlock,
// however few blocks are resident. Which block computes an item changes no bit of it.
#pragma once
#include "scan.cuh"

struct Tickets {
    uint32* next;       // the counter, zero at launch; null: block i has chain i from its first token to its last
    uint32* done;       // (chains,) steps that are done, zero at launch
    int64 chains;
    int64 steps;
    int64 step_tokens;  // a multiple of CHUNK
};

// The block's next ticket; `slot` is shared memory that holds nothing.
__device__ __forceinline__ uint32 take(const Tickets& t, uint32* slot) {
    if (threadIdx.x == 0) *slot = atomicAdd(t.next, 1u);
    __syncthreads();
    const uint32 ticket = *slot;
    __syncthreads();
    return ticket;
}

// Until the first `steps` steps of `chain` are done; what their blocks wrote can then be read.
__device__ __forceinline__ void await_steps(const Tickets& t, uint32 chain, uint32 steps) {
    if (threadIdx.x == 0)
        while (load_acquire(t.done + chain) < steps) spin();
    __syncthreads();
}

// To be called when the block has written what the next step needs.
__device__ __forceinline__ void hand_on(const Tickets& t, uint32 chain, uint32 steps) {
    __syncthreads();
    if (threadIdx.x == 0) store_release(t.done + chain, steps);
}

// The tokens of `s` from position `begin` on, at most `tokens`, as if they were a sequence.
__device__ __forceinline__ Share part_of(Share s, int64 begin, int64 tokens) {
    const int64 end = smaller(s.length, begin + tokens);
    s.start += s.reverse ? s.length - end : begin;
    s.length = end - begin;
    return s;
}
