// How blocks share the forward scan's work. A chain is one run of channels of one direction of one
// sequence. In a static launch each block computes one chain. With tickets the tokens of every chain
// are cut into steps, and blocks take the items (step, chain) in this order from a counter:
//
//     ticket    chain 0   chain 1   chain 2
//     step 0       0         1         2
//     step 1       3         4         5      begins from the states that step 0 left
//
// An item waits for its chain's step before, which has a lower ticket. So the lowest ticket at work
// never waits, and there is no deadlock however few blocks are resident. Which block computes an
// item changes no bit of it.
#pragma once
#include "scan.cuh"

struct Tickets {
    uint32* next;       // the counter, zero at launch; null: block i has chain i from its first token to its last
    uint32* done;       // (chains,): steps of each chain that are done, zero at launch
    int64 chains;
    int64 steps;
    int64 step_tokens;  // of a step: a multiple of INTERVAL
};

// The block's next ticket, told to its threads through `free`: shared memory that holds nothing.
__device__ __forceinline__ uint32 take(const Tickets& t, uint32* free) {
    if (threadIdx.x == 0) *free = atomicAdd(t.next, 1u);
    __syncthreads();
    const uint32 ticket = *free;
    __syncthreads();
    return ticket;
}

// Waits until the first `steps` steps of `chain` are done; what their blocks wrote can then be read.
__device__ __forceinline__ void await_steps(const Tickets& t, uint32 chain, uint32 steps) {
    if (threadIdx.x == 0)
        while (load_acquire(t.done + chain) < steps) spin();
    __syncthreads();
}

// Says that the first `steps` steps of `chain` are done, when the block has written what the next
// one needs.
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
