// Whether the buffers of a call hold what the kernels read and write there: asked once at its
// start, whatever the instruction set.
#include "common.h"

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t cells_of(const StormReduction& r) {
  int64_t frames = ceil_div(ceil_div(r.frames, r.temporal_pool), r.temporal_stride);
  return frames * ceil_div(r.height, r.spatial_pool) * ceil_div(r.width, r.spatial_pool);
}

int64_t kept_tokens(const StormReduction& r) {
  int64_t frames = 0;
  for (int64_t t = 0; t < r.frames; t++) frames += t / r.temporal_pool % r.temporal_stride == 0;
  return frames * r.height * r.width;
}

// Remembers the first buffer that does not fit.
struct Fits {
  const char* refused = nullptr;

  void require(bool fits, const char* name) {
    if (!fits && !refused) refused = name;
  }
  void elements(const char* name, const void* data, int64_t count, int64_t wanted, bool needed) {
    bool absent = !data && !count;
    require(wanted == 0 || (absent ? !needed : data && count >= wanted), name);
  }
  void floats(const char* name, const StormFloats& t, int64_t wanted, bool needed) {
    elements(name, t.data, t.count, wanted, needed);
  }
  void rows(const char* name, const StormTensor& t, int64_t batch, int64_t rows, int64_t groups, int64_t width,
      bool needed) {
    bool empty = !batch || !rows || !groups || !width;
    require(t.batch_stride >= 0 && t.row_stride >= 0 && t.group_stride >= 0, name);
    elements(name, t.data, t.count,
        empty ? 0
              : (batch - 1) * t.batch_stride + (rows - 1) * t.row_stride + (groups - 1) * t.group_stride + width,
        needed);
  }
  void sequences(const StormShape& s) {
    if (!s.cu_seqlens) return;
    bool ascend = s.batch == 1 && s.sequences >= 1 && s.cu_seqlens[0] == 0 && s.cu_seqlens[s.sequences] == s.length;
    for (int64_t i = 0; ascend && i < s.sequences; i++) ascend = s.cu_seqlens[i] <= s.cu_seqlens[i + 1];
    require(ascend, "cu_seqlens");
  }
};

constexpr bool NEEDED = true, OPTIONAL = false;

Fits scan_fits(const StormScan& a, bool backward) {
  Fits fits;
  const StormShape& s = a.shape;
  const bool reduced = a.reduction.frames;
  fits.sequences(s);
  fits.require(
      !reduced || (!s.cu_seqlens && a.reduction.frames * a.reduction.height * a.reduction.width == s.length),
      "grid");
  fits.require(a.groups > 0 && s.channels % a.groups == 0, "groups");
  if (fits.refused) return fits;
  int64_t intervals =
      s.cu_seqlens ? s.length / STORM_INTERVAL + s.sequences : s.batch * ceil_div(s.length, STORM_INTERVAL);
  for (int d = 0; d < a.directions; d++) {
    const StormDirection& direction = a.direction[d];
    fits.rows(d ? "u_b" : "u", direction.u, s.batch, s.length, 1, s.channels, NEEDED);
    fits.rows(d ? "delta_b" : "delta", direction.delta, s.batch, s.length, 1, s.channels, NEEDED);
    fits.rows(d ? "B_b" : "B", direction.B, s.batch, s.length, a.groups, a.states, NEEDED);
    fits.rows(d ? "C_b" : "C", direction.C, s.batch, s.length, a.groups, a.states, NEEDED);
    fits.floats(d ? "A_b" : "A", direction.A, s.channels * a.states, NEEDED);
    fits.floats(d ? "D_b" : "D", direction.D, s.channels, OPTIONAL);
    fits.floats(d ? "delta_bias_b" : "delta_bias", direction.delta_bias, s.channels, OPTIONAL);
    fits.floats("checkpoints", direction.checkpoints, intervals * a.states * s.channels, backward);
  }
  fits.rows("z", a.z, s.batch, a.z_is_kept && reduced ? kept_tokens(a.reduction) : s.length, 1, s.channels, OPTIONAL);
  fits.rows(backward ? "gradient of out" : "out", a.out, s.batch, reduced ? cells_of(a.reduction) : s.length,
      1, s.channels, NEEDED);
  fits.floats("initial_state", a.initial_state, storm_sequence_count(s) * s.channels * a.states, OPTIONAL);
  fits.floats("final_state", a.final_state, storm_sequence_count(s) * s.channels * a.states, OPTIONAL);
  return fits;
}

}  // namespace

const char* storm_refused_by_scan(const StormScan& a) { return scan_fits(a, false).refused; }

const char* storm_refused_by_scan_backward(const StormScan& a, const StormScanGrads& grads) {
  Fits fits = scan_fits(a, true);
  const StormShape& s = a.shape;
  for (int d = 0; d < a.directions && !fits.refused; d++) {
    const StormDirectionGrads& grad = grads.direction[d];
    fits.rows(d ? "gradient of u_b" : "gradient of u", grad.u, s.batch, s.length, 1, s.channels, OPTIONAL);
    fits.rows(d ? "gradient of delta_b" : "gradient of delta", grad.delta, s.batch, s.length, 1, s.channels, OPTIONAL);
    fits.rows(d ? "gradient of B_b" : "gradient of B", grad.B, s.batch, s.length, a.groups, a.states, OPTIONAL);
    fits.rows(d ? "gradient of C_b" : "gradient of C", grad.C, s.batch, s.length, a.groups, a.states, OPTIONAL);
    fits.floats(d ? "gradient of A_b" : "gradient of A", grad.A, s.channels * a.states, OPTIONAL);
    fits.floats(d ? "gradient of D_b" : "gradient of D", grad.D, s.channels, OPTIONAL);
    fits.floats(d ? "gradient of delta_bias_b" : "gradient of delta_bias", grad.delta_bias, s.channels, OPTIONAL);
  }
  if (fits.refused) return fits.refused;
  int64_t states = storm_sequence_count(s) * s.channels * a.states;
  fits.rows("gradient of z", grads.z, s.batch,
      a.z_is_kept && a.reduction.frames ? kept_tokens(a.reduction) : s.length, 1, s.channels, OPTIONAL);
  fits.floats("gradient of final_state", grads.final_state, states, OPTIONAL);
  fits.floats("gradient of initial_state", grads.initial_state, states, OPTIONAL);
  return fits.refused;
}

const char* storm_refused_by_conv(const StormConv& a) {
  Fits fits;
  const StormShape& s = a.shape;
  fits.sequences(s);
  if (fits.refused) return fits.refused;
  int64_t halo = storm_sequence_count(s) * s.channels * (a.taps - 1);
  fits.rows("x", a.x, s.batch, s.length, 1, s.channels, NEEDED);
  fits.rows("gradient of x", a.grad_x, s.batch, s.length, 1, s.channels, OPTIONAL);
  for (int f = 0; f < a.filters; f++) {
    const StormFilter& filter = a.filter[f];
    fits.floats(f ? "weight_b" : "weight", filter.weight, s.channels * a.taps, NEEDED);
    fits.floats(f ? "bias_b" : "bias", filter.bias, s.channels, OPTIONAL);
    fits.rows(f ? "out_b" : "out", filter.out, s.batch, s.length, 1, s.channels, NEEDED);
    fits.floats(f ? "gradient of weight_b" : "gradient of weight", filter.grad_weight, s.channels * a.taps, OPTIONAL);
    fits.floats(f ? "gradient of bias_b" : "gradient of bias", filter.grad_bias, s.channels, OPTIONAL);
  }
  fits.floats("initial_state", a.initial_state, halo, OPTIONAL);
  fits.floats("gradient of initial_state", a.grad_initial_state, halo, OPTIONAL);
  return fits.refused;
}

const char* storm_refused_by_reduce(const StormReduce& a) {
  Fits fits;
  fits.rows("x", a.x, a.batch, a.reduction.frames * a.reduction.height * a.reduction.width, 1, a.channels, NEEDED);
  fits.rows("out", a.out, a.batch, cells_of(a.reduction), 1, a.channels, NEEDED);
  return fits.refused;
}
