// Plain twins of the PTX wrappers in storm_kernels/backends/cuda/src/device.cuh.
#pragma once
#include <cmath>
#include <cstring>

#define DYNAMIC_SHARED(name) unsigned char* name = cuda_on_cpu::shared_memory()

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }

inline float bits_to_float(uint32 x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline uint32 float_to_bits(float x) {
    uint32 y;
    memcpy(&y, &x, 4);
    return y;
}

inline float to_float(fp16 x) {
    int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? ldexpf((float)fraction, -24)
                                      : ldexpf((float)(fraction + 1024), exponent - 25);
    return x.bits >> 15 ? -magnitude : magnitude;
}
inline void from_float(float x, fp16& y) {
    unsigned short sign = std::signbit(x) ? 0x8000 : 0;
    float magnitude = fabsf(x);
    if (magnitude != magnitude) {
        y.bits = 0x7fff;
    } else if (magnitude >= 65520.0f) {
        y.bits = sign | 0x7c00;
    } else {
        int exponent;
        frexpf(magnitude, &exponent);
        exponent = exponent - 1 < -14 ? -14 : exponent - 1;
        int fraction = (int)nearbyintf(ldexpf(magnitude, 10 - exponent));  // to even, 1024 or more where the number is normal
        y.bits = sign | (unsigned short)(fraction < 1024 ? fraction : (exponent + 14) * 1024 + fraction);
    }
}
inline void from_float(float x, bf16& y) {
    uint32 bits = float_to_bits(x);
    y.bits = x != x ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename T>
inline uint32 packed(float2 x, T) {
    T low, high;
    from_float(x.x, low);
    from_float(x.y, high);
    return (uint32)high.bits << 16 | low.bits;
}

// The destination holds NaN until a wait completes the copy, so that a forgotten wait shows.
inline void copy16_async(void* shared, const void* source, int valid) { cuda_on_cpu::copy_later(shared, source, valid); }
inline void copy_commit() { cuda_on_cpu::copy_commit(); }
template <int PENDING>
inline void copy_wait() {
    cuda_on_cpu::copy_wait(PENDING);
}

template <typename T>
inline T* row_at(T* first, int row, int bytes) {
    return (T*)((char*)first + (int64)row * bytes);
}

template <typename T>
inline T pinned(T x) {
    return x;
}

inline uint32 load_acquire(const uint32* flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
inline void store_release(uint32* flag, uint32 value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
inline void spin() { cuda_on_cpu::yield(); }
