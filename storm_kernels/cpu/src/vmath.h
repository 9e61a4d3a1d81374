// exp, sigmoid and softplus on vectors, within about one unit in the last place.
//
// exp(x) = 2^n e^r, n = round(x log2 e), |r| <= log(2)/2. Degree 5 would save one operation in thirteen, but its error (1.8 x 2^-24 at worst,
// with a sign that depends on r) is larger than that of a correctly rounded product and adds up over equal steps; degree 6 leaves 0.05 x 2^-24.
// Rounding to an integer adds and subtracts 1.5 * 2^23, so the sources must not be built with -ffast-math.
#pragma once
#include "vec.h"

namespace {

constexpr float ROUNDER = 12582912.0f;
constexpr float LOG2E = 1.4426950408889634f;
#if defined(__FMA__) || defined(__aarch64__) || defined(__FP_FAST_FMAF)
constexpr bool FUSED = true;  // n LN2 is not rounded before it is subtracted
constexpr float LN2 = 0.6931471805599453f, LN2_LOW = -1.904654323e-9f;  // their sum is log 2
#else
constexpr bool FUSED = false;  // LN2 is short enough for n LN2 to be exact
constexpr float LN2 = 0.693145751953125f, LN2_LOW = 1.428606765330187e-6f;
#endif
constexpr float EXP_LOWEST = -86.0f, EXP_HIGHEST = 88.722839f;          // where e^x is a normal number

// 2^n e^r from t = n + ROUNDER. The polynomial is minimax in relative error with the first two terms of the series fixed: the error fades with r,
// because the small decays of long sequences multiply up.
INLINE vf exp_from(vf t, vf r) {
  vf p = splat(1.38145406e-3f);
  p = p * r + 8.36874545e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (vf)((vi)p + ((vi)t << 23));
}

// e^x where EXP_LOWEST <= x <= 4; other values give nonsense or are off by more than one unit in the last place. Where it can, it
// leaves LN2_LOW out, one operation in thirteen: 2e-9 |n| relative, which only strong decays have.
INLINE vf exp_decay(vf x) {
  vf t = x * LOG2E + ROUNDER, n = t - ROUNDER;
  vf r = x - n * LN2;
  return exp_from(t, FUSED ? r : r - n * LN2_LOW);
}

// e^x for any x: 0 below EXP_LOWEST, infinity above EXP_HIGHEST, NaN for NaN.
INLINE vf exponential(vf x) {
  vf t = x * LOG2E + ROUNDER, n = t - ROUNDER;
  vf in_range = exp_from(t, (x - n * LN2) - n * LN2_LOW);
  vf result = x <= EXP_HIGHEST ? in_range : x + (float)INFINITY;
  return x < EXP_LOWEST ? vf{} : result;
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }
INLINE vf silu(vf x) { return x / (1.0f + exponential(-x)); }

// dy times the derivative of SiLU at x, given s = sigmoid(x)
INLINE vf silu_backward(vf dy, vf x, vf s) { return dy * s * (1.0f + x * (1.0f - s)); }

// x above 20, else log(1 + e^x) = max(x, 0) + log1p(e), e = exp(-|x|); with s = e / (2 + e),
// log1p(e) = 2 atanh(s) = e - s (e - s^2 p(s^2)), p minimax on [0, 1/9]
INLINE vf softplus(vf x) {
  vf e = exponential(-absolute(x));
  vf s = e / (2.0f + e), q = s * s;
  vf p = splat(2.42895633e-1f);
  p = p * q + 2.14307398e-1f;
  p = p * q + 2.86165982e-1f;
  p = p * q + 3.9998889e-1f;
  p = p * q + 6.66666746e-1f;
  vf log1p_e = e - s * (e - p * q);
  vf result = (x > 0.0f ? x : vf{}) + log1p_e;
  result = x > 20.0f ? x : result;
  return x == x ? result : x;
}

}  // namespace
