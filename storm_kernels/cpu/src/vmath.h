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
constexpr float LN2 = 0.6931471805599453f;
constexpr float EXP_LOWEST = -86.0f, EXP_HIGHEST = 88.722839f;  // where e^x is a normal number

// e^x where EXP_LOWEST <= x <= EXP_HIGHEST; anything else gives nonsense. The polynomial is minimax in relative error with the first two terms of
// the series fixed: the error fades with x, because the small decays of long sequences multiply up. n LN2 is 2e-9 n off: nothing while n < 30.
INLINE vf exp_in_range(vf x) {
  vf t = x * LOG2E + ROUNDER;
  vf r = x - (t - ROUNDER) * LN2;
  vf p = splat(1.38145406e-3f);
  p = p * r + 8.36874545e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (vf)((vi)p + ((vi)t << 23));
}

// The same for any x: 0 below, infinity above, NaN for NaN.
INLINE vf exponential(vf x) {
  vf result = x <= EXP_HIGHEST ? exp_in_range(x) : x + (float)INFINITY;
  return x < EXP_LOWEST ? vf{} : result;
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }
INLINE vf silu(vf x) { return x / (1.0f + exponential(-x)); }

// d silu(x) / dx, from sigmoid(x)
INLINE vf silu_slope(vf x, vf s) { return s * (1.0f + x * (1.0f - s)); }

// x above 20, else log(1 + e^x) = max(x, 0) + log1p(e), e = exp(-|x|); with s = e / (2 + e), log1p(e) = 2 atanh(s) = e - s (e - 2 s^2/3 - 2 s^4/5 - ...)
INLINE vf softplus(vf x) {
  vf e = exponential(-absolute(x));
  vf s = e / (2.0f + e), q = s * s;
  vf p = splat(2.0f / 11);
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  vf log1p_e = e - s * (e - p * q);
  vf result = (x > 0.0f ? x : vf{}) + log1p_e;
  result = x > 20.0f ? x : result;
  return x == x ? result : x;
}

}  // namespace
