// Runs a CUDA kernel on a CPU: a block's threads are fibers taking turns, and blocks run one after the other or, to exercise hand-over between
// blocks, a few at once, each on a thread of its own. Included before the kernel's source; knows only what our kernels use.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>

#define STORM_ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace cuda_on_cpu {

struct Index {
    unsigned x, y, z;
};

const Index& thread_index();
const Index& block_index();
const Index& grid_size();
unsigned char* shared_memory();
void wait_block();
bool any_of_block(bool value);
void wait_warp();
void yield();
float shuffle_xor(float value, int mask);
void copy_later(void* shared, const void* source, int valid);
void copy_commit();
void copy_wait(size_t pending);

// STUCK: a block's threads wait for something that never comes. CLASH: a copy was asked for while another was under way to the same place.
// BEYOND: a thread reached past shared memory, or past global memory where pages guard it.
enum Outcome { FINE, STUCK, CLASH, BEYOND };

// `at_once` blocks run side by side, each on a thread.
Outcome run(unsigned blocks, unsigned threads, size_t shared_bytes, unsigned at_once, void (*kernel)(const void*), const void* args);

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::block_index())
#define gridDim (cuda_on_cpu::grid_size())

inline void __syncthreads() { cuda_on_cpu::wait_block(); }
inline int __syncthreads_or(int value) { return cuda_on_cpu::any_of_block(value); }
inline void __syncwarp() { cuda_on_cpu::wait_warp(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) { return cuda_on_cpu::shuffle_xor(value, mask); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL); }
