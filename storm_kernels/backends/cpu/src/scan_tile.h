// What the forward and the backward scan share: parameters, states and the inputs of one tile.
#pragma once
#include "chunk.h"
#include "vmath.h"

namespace {

// Over more states than these, sums go in two steps, so that rounding does not grow with the number
// of states.
constexpr int64_t STATE_RUN = 32;

// One direction's parameters for one chunk.
struct Parameters {
  float* A;         // log2(e) A / unit, [block][state][lane]: 2^(delta A) has one operation less than e^(delta A)
  float* unit;      // [block]: 1, or 2 where log2(e) A would be too large for a float32
  float* lowest;    // (pitch,): min over states of it
  float* highest;   // (pitch,): max over states of it
  float *bias, *D;  // (pitch,), zero where absent
  bool has_D;
  void take(Arena& arena, int pitch, int64_t states) {
    A = arena.floats(pitch * states);
    unit = arena.floats(pitch / LANES);
    lowest = arena.floats(pitch);
    highest = arena.floats(pitch);
    bias = arena.floats(pitch);
    D = arena.floats(pitch);
  }
};

INLINE float times_log2e(float a) { return (float)(a * 1.4426950408889634); }

INLINE int64_t state_index(int channel, int64_t state, int64_t states) {
  return (channel / LANES * states + state) * LANES + channel % LANES;
}

void load_parameters(Parameters& p, const StormDirection& d, const Chunk& c, int64_t states) {
  p.has_D = d.D.data != nullptr;
  for (int block = 0; block < c.blocks(); block++) p.unit[block] = 1.0f;
  for (int e = 0; e < c.pitch; e++) {
    bool inside = e < c.width;
    p.bias[e] = inside && d.delta_bias.data ? d.delta_bias.data[c.first + e] : 0.0f;
    p.D[e] = inside && d.D.data ? d.D.data[c.first + e] : 0.0f;
    float lowest = 0.0f, highest = 0.0f;
    for (int64_t s = 0; s < states; s++) {
      float a = inside ? times_log2e(d.A.data[(c.first + e) * states + s]) : 0.0f;
      p.A[state_index(e, s, states)] = a;
      if (a < lowest || a != a) lowest = a;  // NaN stays
      if (a > highest) highest = a;
    }
    if (isinf(lowest) || isinf(highest)) p.unit[e / LANES] = 2.0f;
    p.lowest[e] = lowest;
    p.highest[e] = highest;
  }
  for (int e = 0; e < c.width; e++)
    for (int64_t s = 0; p.unit[e / LANES] != 1.0f && s < states; s++)
      p.A[state_index(e, s, states)] = times_log2e(d.A.data[(c.first + e) * states + s] / p.unit[e / LANES]);
}

// Between (sequence, E, S) and [block][state][lane]; a null source means zeros.
void load_states(const float* from, int64_t sequence, int64_t channels, const Chunk& c, int64_t states, float* h) {
  memset(h, 0, sizeof(float) * c.pitch * states);
  if (!from) return;
  from += (sequence * channels + c.first) * states;
  for (int e = 0; e < c.width; e++)
    for (int64_t s = 0; s < states; s++) h[state_index(e, s, states)] = from[e * states + s];
}

void store_states(float* to, int64_t sequence, int64_t channels, const Chunk& c, int64_t states, const float* h) {
  to += (sequence * channels + c.first) * states;
  for (int e = 0; e < c.width; e++)
    for (int64_t s = 0; s < states; s++) to[e * states + s] = h[state_index(e, s, states)];
}

// One direction's inputs over one sequence, rows in scan order.
struct ScanRows {
  Rows u, delta, B, C;
};

INLINE ScanRows direction_rows(const StormDirection& d, const StormSequence& q, const Chunk& c, int64_t states) {
  return {scan_rows(d.u, q, d.reverse, c.first, c.width), scan_rows(d.delta, q, d.reverse, c.first, c.width),
      scan_rows(d.B, q, d.reverse, c.group * d.B.group_stride, (int)states),
      scan_rows(d.C, q, d.reverse, c.group * d.C.group_stride, (int)states)};
}

// A tile's inputs in float32.
struct Tile {
  float *raw;         // delta + bias; only where asked for
  float *delta, *u;   // [token][pitch]; delta after bias and softplus
  float *B, *C;       // [token][bc_pitch]
  int bc_pitch;
  void take(Arena& arena, int tokens, int pitch, int64_t states, bool keep_raw) {
    bc_pitch = round_up(states, LANES);
    raw = keep_raw ? arena.floats(size_t(tokens) * pitch) : nullptr;
    delta = arena.floats(size_t(tokens) * pitch);
    u = arena.floats(size_t(tokens) * pitch);
    B = arena.floats(size_t(tokens) * bc_pitch);
    C = arena.floats(size_t(tokens) * bc_pitch);
  }
};

void load_tile(Tile& tile, const ScanRows& rows, int64_t first, int count, const Chunk& c, const Parameters& p,
    bool with_softplus) {
  load_rows(rows.delta.skip(first), count, tile.delta, c.pitch);
  load_rows(rows.u.skip(first), count, tile.u, c.pitch);
  load_rows(rows.B.skip(first), count, tile.B, tile.bc_pitch);
  load_rows(rows.C.skip(first), count, tile.C, tile.bc_pitch);
  for (int i = 0; i < count; i++)
    for (int j = 0; j < c.pitch; j += LANES) {
      float* at = tile.delta + i * c.pitch + j;
      vf v = load(at) + load(p.bias + j);
      if (tile.raw) store(tile.raw + i * c.pitch + j, v);
      store(at, with_softplus ? softplus(v) : v);
    }
}

// Whether every exponent delta * A of this block stays in the range of exp2_in_range; then its unit
// is 1.
INLINE bool decays_only(const float* delta, int pitch, int count, vf lowest, vf highest) {
  vi inside = vi{} - 1;
  for (int i = 0; i < count; i++) {
    vf step = load(delta + i * pitch);
    inside &= (step >= 0.0f) & (step * lowest >= EXP2_LOWEST) & (step * highest < EXP2_END);
  }
  return !any(~inside);
}

}  // namespace
