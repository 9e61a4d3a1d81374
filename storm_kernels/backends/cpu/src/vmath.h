// 2^x, exp, sigmoid and softplus on vectors, within about one unit in the last place.
//
// 2^x = 2^n 2^r, n = round(x), |r| <= 1/2, so r is exact. Degree 5 would save one operation in ten,
// but its error (1.8 x 2^-24 at worst, with a sign that depends on r) is larger than that of a
// correctly rounded product and adds up over equal steps; degree 6 leaves 0.05 x 2^-24. Rounding to
// an integer adds and subtracts 1.5 * 2^23, so the sources must not be built with -ffast-math.
#pragma once
#include "vec.h"

namespace {

constexpr float ROUNDER = 12582912.0f;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float EXP_LOWEST = -86.0f, EXP_HIGHEST = 88.722839f;  // where e^x is a normal number
constexpr float EXP2_LOWEST = -124.0f, EXP2_END = 128.0f;       // where 2^x is a normal number

// 2^n 2^r from t = n + ROUNDER. The polynomial is minimax in relative error with the first two
// terms of the series fixed: the error fades with r, because the small decays of long sequences
// multiply up.
INLINE vf exp2_from(vf t, vf r) {
  vf p = splat(1.53264758e-4f);
  p = p * r + 1.33908063e-3f;
  p = p * r + 9.61850584e-3f;
  p = p * r + 5.55035993e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return (vf)((vi)p + ((vi)t << 23));
}

// 2^x where EXP2_LOWEST <= x < EXP2_END; other values give nonsense.
INLINE vf exp2_in_range(vf x) {
  vf t = x + ROUNDER;
  return exp2_from(t, x - (t - ROUNDER));
}

// 2^x for any x: 0 below EXP2_LOWEST, infinity from EXP2_END on, NaN for NaN.
INLINE vf exp2_any(vf x) {
  vf result = x < EXP2_END ? exp2_in_range(x) : x + (float)INFINITY;
  return x < EXP2_LOWEST ? vf{} : result;
}

// x log2(e) - n, small beside either
INLINE vf past_round(vf x, vf n) {
#if defined(__FMA__) || defined(__aarch64__) || defined(__FP_FAST_FMAF)
  return (x * LOG2E - n) + x * 1.92596299e-8f;  // a product is not rounded before n is subtracted
#else
  // n times the first, short constant is exact
  return ((x - n * 0.693145751953125f) - n * 1.428606765330187e-6f) * LOG2E;
#endif
}

// e^x for x up to EXP_HIGHEST: 0 below EXP_LOWEST, NaN for NaN.
INLINE vf exp_finite(vf x) {
  vf t = x * LOG2E + ROUNDER;
  vf result = exp2_from(t, past_round(x, t - ROUNDER));
  return x < EXP_LOWEST ? vf{} : result;
}

// e^x for any x: 0 below EXP_LOWEST, infinity above EXP_HIGHEST, NaN for NaN.
INLINE vf exponential(vf x) {
  vf result = exp_finite(x);
  return x <= EXP_HIGHEST ? result : x + (float)INFINITY;
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }
INLINE vf silu(vf x) { return x / (1.0f + exponential(-x)); }

// dy times the derivative of SiLU at x, given s = sigmoid(x)
INLINE vf silu_backward(vf dy, vf x, vf s) { return dy * s * (1.0f + x * (1.0f - s)); }

// log(1 + e^x) = max(x, 0) + log1p(e), e = exp(-|x|), which above 20 is x as it should be; with
// s = e / (2 + e), log1p(e) = 2 atanh(s) = e - s (e - s^2 p(s^2)), p minimax on [0, 1/9]
INLINE vf softplus(vf x) {
  vf e = exp_finite(-absolute(x));
  vf s = e / (2.0f + e), q = s * s;
  vf p = splat(2.42895633e-1f);
  p = p * q + 2.14307398e-1f;
  p = p * q + 2.86165982e-1f;
  p = p * q + 3.9998889e-1f;
  p = p * q + 6.66666746e-1f;
  return (x < 0.0f ? vf{} : x) + (e - s * (e - p * q));
}

}  // namespace
