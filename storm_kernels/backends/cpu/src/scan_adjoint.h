// The two passes of the backward scan over one block and one interval: the states again, then the
// adjoint. A thread's arrays:
//
//     decay             [token][state][lane]
//     h                 [token][state][lane]   one row more: h[0] is the checkpoint, h[i + 1] follows token i
//     sum_B, sum_C      [token][state][lane]   summed over the chunk's blocks
//     g, dA, dA_error   [state][lane]
#pragma once
#include "scan_tile.h"

namespace {

constexpr int INTERVAL = STORM_INTERVAL;

struct Block {
  const float *delta, *u, *dy, *B, *C, *A;  // A times log2(e), over its unit
  float unit;
  float *h, *decay;
  float *y;                  // null where not asked for
  float *sum_B, *sum_C;
  float *g;                  // gradient of the state, handed on from each interval to the one before it
  float *d_input, *d_delta;  // gradients of delta u, and of delta through the decay
  float *dA, *dA_error;      // the sum and its rounding error
  int pitch, d_pitch, bc_pitch, count;  // d_pitch: of d_input and d_delta
  int64_t states;
};

template <bool DECAY>
void recompute(const Block& b) {
  for (int i = 0; i < b.count; i++) {
    const vf delta = load(b.delta + i * b.pitch), delta_u = delta * load(b.u + i * b.pitch);
    const vf rate = DECAY ? delta : delta * b.unit;
    const float *B = b.B + i * b.bc_pitch, *C = b.C + i * b.bc_pitch;
    const int64_t row = i * b.states;
    vf y = {};
    for (int64_t begin = 0; begin < b.states; begin += STATE_RUN) {
      const int64_t end = b.states - begin < STATE_RUN ? b.states : begin + STATE_RUN;
      vf run = {};
#pragma GCC unroll 4
      for (int64_t s = begin; s < end; s++) {
        vf exponent = rate * load(b.A + s * LANES), decay = DECAY ? exp2_in_range(exponent) : exp2_any(exponent);
        vf h = decay * load(b.h + (row + s) * LANES) + delta_u * B[s];
        store(b.decay + (row + s) * LANES, decay);
        store(b.h + (row + b.states + s) * LANES, h);
        if (b.y) run += h * C[s];
      }
      y += run;
    }
    if (b.y) store(b.y + i * b.pitch, y);
  }
}

// The adjoint of COUNT states, from `first` on.
template <int COUNT>
void adjoint(const Block& b, int64_t first) {
  vf g[COUNT], dA[COUNT] = {}, A[COUNT];
  for (int n = 0; n < COUNT; n++) g[n] = load(b.g + (first + n) * LANES), A[n] = load(b.A + (first + n) * LANES);
  for (int i = b.count - 1; i >= 0; i--) {
    const int64_t at = (i * b.states + first) * LANES, next = at + b.states * LANES;
    const float *B = b.B + i * b.bc_pitch + first, *C = b.C + i * b.bc_pitch + first;
    const vf delta = load(b.delta + i * b.pitch), delta_u = delta * load(b.u + i * b.pitch),
             dy = load(b.dy + i * b.pitch);
    vf d_input = {}, d_delta = {};
#pragma GCC unroll 4
    for (int n = 0; n < COUNT; n++) {
      const int64_t k = at + n * LANES;
      g[n] += dy * C[n];
      store(b.sum_C + k, load(b.sum_C + k) + dy * load(b.h + next + n * LANES));
      store(b.sum_B + k, load(b.sum_B + k) + g[n] * delta_u);
      d_input += g[n] * B[n];
      g[n] *= load(b.decay + k);
      vf through_decay = g[n] * load(b.h + k);
      d_delta += through_decay * A[n];
      dA[n] += through_decay * delta;
    }
    store(b.d_input + i * b.d_pitch, load(b.d_input + i * b.d_pitch) + d_input);
    store(b.d_delta + i * b.d_pitch, load(b.d_delta + i * b.d_pitch) + d_delta * (LN2 * b.unit));
    if (i % SUM_RUN) continue;
    for (int n = 0; n < COUNT; n++) {
      add_compensated(b.dA + (first + n) * LANES, b.dA_error + (first + n) * LANES, dA[n]);
      dA[n] = vf{};
    }
  }
  for (int n = 0; n < COUNT; n++) store(b.g + (first + n) * LANES, g[n]);
}

}  // namespace
