// What the kernels use of the machine: number formats, fast functions, asynchronous copies,
// ordering between blocks. Each has a plain twin, so that the same sources run on a CPU
// (tests/support/cuda_on_cpu). No CUDA header is included: NVRTC finds none on users' machines.
#pragma once

typedef long long int64;
typedef unsigned int uint32;

struct bf16 {
    unsigned short bits;
};
struct fp16 {
    unsigned short bits;
};

#ifndef STORM_ON_CPU
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float bits_to_float(uint32 x) { return __uint_as_float(x); }
__device__ __forceinline__ float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ void from_float(float x, fp16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void from_float(float x, bf16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// Two values in 32 bits, the first in the low half.
__device__ __forceinline__ uint32 packed(float2 x, bf16) {
    uint32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(x.y), "f"(x.x));
    return y;
}
__device__ __forceinline__ uint32 packed(float2 x, fp16) {
    uint32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(x.y), "f"(x.x));
    return y;
}

// Copies 16 bytes into shared memory, the first `valid` from `source` and the rest zeros, without
// waiting.
__device__ __forceinline__ void copy16_async(void* shared, const void* source, int valid) {
    uint32 address = (uint32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(valid) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until of this thread's commits at most the last `PENDING` are still under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// What lies `row` times `bytes` past `first`, in global memory: in one instruction.
template <typename T>
__device__ __forceinline__ T* row_at(T* first, int row, int bytes) {
    T* there;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(there) : "r"(row), "r"(bytes), "l"(first));
    __builtin_assume(__isGlobal(there));
    return there;
}

// The same value, but the compiler does not know that: it keeps the value in a register instead of
// computing it again wherever it is used. Signed numbers pass through a shuffle with the lane
// itself, one instruction; the others through an assembly statement that holds none.
__device__ __forceinline__ int pinned(int x) { return __shfl_xor_sync(0xffffffffu, x, 0); }
__device__ __forceinline__ int64 pinned(int64 x) { return __shfl_xor_sync(0xffffffffu, x, 0); }
__device__ __forceinline__ uint32 pinned(uint32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
// `x` points into global memory.
template <typename T>
__device__ __forceinline__ T* pinned(T* x) {
    asm volatile("" : "+l"(x));
    __builtin_assume(__isGlobal(x));
    return x;
}

// What was written before a release by one block is seen after the acquire that reads it in
// another.
__device__ __forceinline__ uint32 load_acquire(const uint32* flag) {
    uint32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
__device__ __forceinline__ void store_release(uint32* flag, uint32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void spin() { __nanosleep(20); }
#else
#include "cuda_on_cpu_twins.h"
#endif

// What lies a number of bytes past `first`.
template <typename T, typename Bytes>
__device__ __forceinline__ T* past(T* first, Bytes bytes) {
    return (T*)((char*)first + bytes);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return bits_to_float((uint32)x.bits << 16); }
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }

// Two values beside each other, whose address is a multiple of their size.
__device__ __forceinline__ float2 load_pair(const float* x) { return *(const float2*)x; }
__device__ __forceinline__ float2 load_pair(const bf16* x) {
    uint32 bits = *(const uint32*)x;
    return make_float2(bits_to_float(bits << 16), bits_to_float(bits & 0xffff0000u));
}
__device__ __forceinline__ float2 load_pair(const fp16* x) { return make_float2(to_float(x[0]), to_float(x[1])); }

// Stores a pair or, unless it is `whole`, its first value; at once where `aligned`.
__device__ __forceinline__ void store_pair(float2 x, float* to, bool whole, bool aligned) {
    if (aligned && whole) {
        *(float2*)to = x;
    } else {
        to[0] = x.x;
        if (whole) to[1] = x.y;
    }
}
template <typename T>
__device__ __forceinline__ void store_pair(float2 x, T* to, bool whole, bool aligned) {
    if (aligned && whole) {
        *(uint32*)to = packed(x, T());
    } else {
        from_float(x.x, to[0]);
        if (whole) from_float(x.y, to[1]);
    }
}

// Four values beside each other, whose address is a multiple of their size.
__device__ __forceinline__ void load_quad(float (&v)[4], const float* x) {
    const float4 four = *(const float4*)x;
    v[0] = four.x;
    v[1] = four.y;
    v[2] = four.z;
    v[3] = four.w;
}
__device__ __forceinline__ void unpack(float& low, float& high, uint32 bits, bf16) {
    low = bits_to_float(bits << 16);
    high = bits_to_float(bits & 0xffff0000u);
}
__device__ __forceinline__ void unpack(float& low, float& high, uint32 bits, fp16) {
    low = to_float(fp16{(unsigned short)bits});
    high = to_float(fp16{(unsigned short)(bits >> 16)});
}
template <typename T>
__device__ __forceinline__ void load_quad(float (&v)[4], const T* x) {
    const uint2 bits = *(const uint2*)x;
    unpack(v[0], v[1], bits.x, T());
    unpack(v[2], v[3], bits.y, T());
}
__device__ __forceinline__ void store_quad(const float (&v)[4], float* to) {
    *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
}
template <typename T>
__device__ __forceinline__ void store_quad(const float (&v)[4], T* to) {
    *(uint2*)to = make_uint2(packed(make_float2(v[0], v[1]), T()), packed(make_float2(v[2], v[3]), T()));
}

__device__ constexpr bool alike(float, float) { return true; }
__device__ constexpr bool alike(bf16, bf16) { return true; }
__device__ constexpr bool alike(fp16, fp16) { return true; }
template <typename T, typename V>
__device__ constexpr bool alike(T, V) {
    return false;
}

// Where a token goes under a reduction. 16 bytes: one load, one asynchronous copy.
struct __align__(16) TokenEntry {
    int cell;      // -1 if sampling drops the token
    int kept;      // index among the kept tokens; -1 if the token is dropped
    float weight;  // one over the number of tokens of the cell
    int token;     // its own index
};

__device__ __forceinline__ int64 smaller(int64 a, int64 b) { return a < b ? a : b; }

constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * LOG2E); }

// log(1 + e) for e in [0, 1]: e times the degree-8 minimax polynomial of log(1 + e) / e, relative
// error 1.4e-7 in float32. log2's hardware instruction would lose the small values: its error is
// absolute near 1.
__device__ __forceinline__ float log1p_unit(float e) {
    const float c[9] = {1.0f,        -0.49999648f, 0.33321324f,  -0.24857163f, 0.19153652f,
                        -0.13753796f, 0.079204455f, -0.03006574f, 0.0053648106f};
    float p = c[8];
#pragma unroll
    for (int i = 7; i >= 0; i--) p = fmaf(p, e, c[i]);
    return p * e;
}

// Past 20 it equals x in float32, which is docs/spec.md's threshold.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1p_unit(exp_fast(-fabsf(x))); }

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp_fast(-x)); }

// Without the error that rounding x log2(e) makes in `sigmoid`: for kernels that memory limits.
__device__ __forceinline__ float sigmoid_close(float x) {
    // 1.925963e-8 is what LOG2E lacks of log2(e).
    float power = -x * LOG2E, lost = fmaf(-x, 1.925963e-8f, fmaf(-x, LOG2E, -power)), e = exp2_fast(power);
    return reciprocal(1.0f + (fabsf(power) < 126.0f ? fmaf(e * 0.6931471805599453f, lost, e) : e));
}

// A sum that keeps its rounding error beside it (Kahan): however long, it is as exact as a tree's.
struct Sum {
    float value = 0.0f, lost = 0.0f;

    __device__ __forceinline__ void add(float x) {
        float wanted = x - lost, next = value + wanted;
        lost = (next - value) - wanted;
        value = next;
    }
};
