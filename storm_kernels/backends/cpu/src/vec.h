// Vectors of LANES floats on the compiler's vector extensions, and rows of float32, bfloat16 or
// float16 to and from them. Everything is in an unnamed namespace: each instruction-set variant
// keeps its own copy, so the linker cannot mix them.
#pragma once
#include <math.h>
#include <string.h>

#include "api.h"

#ifndef STORM_LANES
#if defined(__AVX512F__)
#define STORM_LANES 16
#elif defined(__AVX2__)
#define STORM_LANES 8
#else
#define STORM_LANES 4
#endif
#endif

#define STORM_JOIN2(a, b) a##_##b
#define STORM_JOIN(a, b) STORM_JOIN2(a, b)
#define STORM_EXPORT(name) extern "C" __attribute__((visibility("default"))) int STORM_JOIN(name, STORM_ISA)
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

constexpr int LANES = STORM_LANES, WIDE_LANES = LANES / 2;  // of float32, of float64: a register's
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef float vf_half __attribute__((vector_size(LANES * 2)));
typedef double vd __attribute__((vector_size(LANES * 4)));

INLINE vf splat(float x) { return x - vf{}; }  // x - 0 is x, of either sign
INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vd load_widened(const float* p) {
  vf_half v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vd);
}
INLINE vd load_wide(const double* p) {
  vd v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store_wide(double* p, vd v) { memcpy(p, &v, sizeof v); }
INLINE vf absolute(vf v) { return (vf)((vi)v & 0x7fffffff); }

template <class Mask>
INLINE bool any(Mask m) {
  int32_t lanes[LANES];
  memcpy(lanes, &m, sizeof lanes);
  int32_t all = 0;
  for (int i = 0; i < LANES; i++) all |= lanes[i];
  return all != 0;
}

INLINE float sum(vf v) {
  float a[LANES];
  memcpy(a, &v, sizeof a);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] += a[i + width];
  return a[0];
}

// One element type: how LANES of them become float32 and back. Rounding is to nearest, ties to
// even, as PyTorch's.
struct Float32 {
  typedef float type;
  static INLINE vf widen(const void* p) { return load((const float*)p); }
  static INLINE void narrow(void* p, vf v) { store((float*)p, v); }
};

struct BFloat16 {
  typedef uint16_t type;
  static INLINE vf widen(const void* p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
  }
  static INLINE void narrow(void* p, vf v) {
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vh h = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40u, vh);
    memcpy(p, &h, sizeof h);
  }
};

struct Float16 {
  typedef uint16_t type;
  static INLINE vf widen(const void* p) {
    vh h;
    memcpy(&h, p, sizeof h);
    vu bits = __builtin_convertvector(h, vu);
    vu magnitude = (bits & 0x7fffu) << 13;
    vu finite = (vu)((vf)magnitude * splat(0x1p112f));  // moves the exponent's bias; exact, subnormals too
    vu number = (bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite;
    return (vf)(number | (bits & 0x8000u) << 16);
  }
  static INLINE void narrow(void* p, vf v) {
    vu bits = (vu)v, magnitude = bits & 0x7fffffffu;
    vu normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    vu subnormal = (vu)((vf)magnitude + splat(0.5f)) - 0x3f000000u;  // 0.5 has the subnormals' unit in its last place
    vu h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? vu{} + 0x7c00u : h;
    h = magnitude > 0x7f800000u ? vu{} + 0x7e00u : h;
    vh packed = __builtin_convertvector(h | ((bits >> 16) & 0x8000u), vh);
    memcpy(p, &packed, sizeof packed);
  }
};

// Rows of `width` channels in memory, `step` bytes apart (negative when scanned from the end).
struct Rows {
  char* data;
  int64_t step, dtype;
  int width;
  Rows skip(int64_t rows) const { return {data + rows * step, step, dtype, width}; }
};

INLINE int64_t element_size(int64_t dtype) { return dtype == STORM_FLOAT32 ? 4 : 2; }

// Asks for the line of memory that holds channel `j` of row `i`.
INLINE void prefetch(const Rows& rows, int i, int j) {
  __builtin_prefetch(rows.data + i * rows.step + j * element_size(rows.dtype));
}

template <class T>
INLINE void load_rows_as(Rows rows, int count, float* to, int pitch) {
  for (int i = 0; i < count; i++, to += pitch) {
    const char* from = rows.data + i * rows.step;
    int j = 0;
    for (; j + LANES <= rows.width; j += LANES) store(to + j, T::widen(from + j * sizeof(typename T::type)));
    if (j == pitch) continue;
    typename T::type tail[LANES] = {};
    memcpy(tail, from + j * sizeof(typename T::type), (rows.width - j) * sizeof(typename T::type));
    store(to + j, T::widen(tail));
    for (j += LANES; j < pitch; j += LANES) store(to + j, vf{});
  }
}

template <class T>
INLINE void store_rows_as(Rows rows, int count, const float* from, int pitch) {
  for (int i = 0; i < count; i++, from += pitch) {
    char* to = rows.data + i * rows.step;
    int j = 0;
    for (; j + LANES <= rows.width; j += LANES) T::narrow(to + j * sizeof(typename T::type), load(from + j));
    if (j == rows.width) continue;
    typename T::type tail[LANES];
    T::narrow(tail, load(from + j));
    memcpy(to + j * sizeof(typename T::type), tail, (rows.width - j) * sizeof(typename T::type));
  }
}

// To float32 rows `pitch` floats apart (pitch a multiple of LANES, at least width), with zeros past
// width.
void load_rows(Rows rows, int count, float* to, int pitch) {
  if (rows.dtype == STORM_FLOAT32) load_rows_as<Float32>(rows, count, to, pitch);
  else if (rows.dtype == STORM_BFLOAT16) load_rows_as<BFloat16>(rows, count, to, pitch);
  else load_rows_as<Float16>(rows, count, to, pitch);
}

// From float32 rows `pitch` floats apart; writes width elements of each row and nothing beside
// them.
void store_rows(Rows rows, int count, const float* from, int pitch) {
  if (rows.dtype == STORM_FLOAT32) store_rows_as<Float32>(rows, count, from, pitch);
  else if (rows.dtype == STORM_BFLOAT16) store_rows_as<BFloat16>(rows, count, from, pitch);
  else store_rows_as<Float16>(rows, count, from, pitch);
}

INLINE int round_up(int64_t n, int multiple) { return (int)((n + multiple - 1) / multiple * multiple); }

}  // namespace
