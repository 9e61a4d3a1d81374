// For tests and benchmarks: the elementary functions by themselves, and the rate of exp and its two
// multiply-adds with nothing else around.
#include "vmath.h"

namespace {

template <class F>
void map(const float* in, float* out, int64_t count, F f) {
  for (int64_t i = 0; i < count; i += LANES) {
    int64_t n = count - i < LANES ? count - i : LANES;
    float lanes[LANES] = {};
    memcpy(lanes, in + i, sizeof(float) * n);
    store(lanes, f(load(lanes)));
    memcpy(out + i, lanes, sizeof(float) * n);
  }
}

enum { EXP, SIGMOID, SILU, SOFTPLUS, EXP2 };

}  // namespace

// out[i] = function(in[i]); `function` is one of the enumeration above.
STORM_EXPORT(storm_probe_function)(int function, const float* in, float* out, int64_t count) {
  switch (function) {
    case EXP: map(in, out, count, [](vf x) { return exponential(x); }); return STORM_OK;
    case SIGMOID: map(in, out, count, [](vf x) { return sigmoid(x); }); return STORM_OK;
    case SILU: map(in, out, count, [](vf x) { return silu(x); }); return STORM_OK;
    case SOFTPLUS: map(in, out, count, [](vf x) { return softplus(x); }); return STORM_OK;
    case EXP2: map(in, out, count, [](vf x) { return exp2_any(x); }); return STORM_OK;
  }
  return -1;
}

// steps x 8 x LANES items of h = 2^(delta A) h + x, y += h c on each thread, all in registers where
// there are enough; returns the lanes.
STORM_EXPORT(storm_probe_rate)(int64_t steps, int64_t threads, float* sink) {
  float total = 0.0f;
#pragma omp parallel num_threads((int)threads) reduction(+ : total)
  {
    constexpr int CHAINS = 8;
    vf h[CHAINS] = {}, y = {}, delta = splat(-0.25f);
    for (int64_t i = 0; i < steps; i++) {
      for (int n = 0; n < CHAINS; n++) {
        h[n] = exp2_in_range(delta * (1.0f + n)) * h[n] + delta;
        y += h[n] * delta;
      }
      delta = (vf)((vi)delta ^ 1);  // so that nothing can be hoisted
    }
    total += sum(y);
  }
  *sink = total;
  return LANES * 8;
}
