// Depthwise convolution over time, forward and backward, one filter or both directions from one
// read of x. Positions are natural token indices of the sequence; those outside [0, length) hold
// the initial state on the filter's side, zeros elsewhere.
#include <stdlib.h>

#include "chunk.h"
#include "vmath.h"

namespace {

constexpr int CONV_TILE = 8;        // tokens: a tile of x and one of y stay in the first-level cache
constexpr int CHUNK_WIDTH = 256;    // channels
constexpr int64_t MOST_SPANS = 16;  // each has weight gradients of its own, which are then added in order

// y[i] = then(bias + sum_k w[k] x[i + k step], i, channel) for `count` rows i; `x` is the row that w[0]
// meets for row 0.
template <int TAPS, class Then>
void filter_rows(const float* x, int step, const float* w, const float* bias, int taps_, int count, int pitch,
    float* y, Then then) {
  const int taps = TAPS ? TAPS : taps_;
  for (int i = 0; i < count; i++)
    for (int j = 0; j < pitch; j += LANES) {
      const float* from = x + i * pitch + j;
      vf total = load(bias + j);
#pragma GCC unroll 4
      for (int k = 0; k < taps; k++) total += load(w + k * pitch + j) * load(from + k * step * pitch);
      store(y + i * pitch + j, then(total, i, j));
    }
}

template <class Then>
void filter_rows_any(const float* x, int step, const float* w, const float* bias, int taps, int count, int pitch,
    float* y, Then then) {
  taps == 4 ? filter_rows<4>(x, step, w, bias, taps, count, pitch, y, then)
            : filter_rows<0>(x, step, w, bias, taps, count, pitch, y, then);
}

// One thread's work: a chunk of channels of one sequence (forward) or of a span of them (backward).
// Buffers of a tile, 3 taps:
//
//     x    | halo | halo | CONV_TILE tokens | halo | halo |
//     y    | CONV_TILE tokens | halo | halo |                  outputs; the halo backward only
struct ConvWork {
  const StormConv& a;
  Chunk c;
  int taps, halo;
  int64_t sequence;
  StormSequence q;
  float *w[2], *bias[2];        // [tap][pitch], (pitch,)
  float *x, *y;                 // [halo + CONV_TILE + halo][pitch]; [CONV_TILE + halo][pitch]
  float *dx, *dy;               // [CONV_TILE][pitch]; [CONV_TILE + halo][pitch]
  double* sums[2];              // [tap, then bias][pitch]

  ConvWork(const StormConv& args, const Chunk& chunk) : a(args), c(chunk), taps((int)a.taps), halo(taps - 1) {}

  bool allocate(bool backward) {
    Arena arena = {nullptr, 0};
    for (int pass = 0; pass < 2; pass++) {
      for (int f = 0; f < a.filters; f++) {
        w[f] = arena.floats(size_t(taps) * c.pitch);
        bias[f] = arena.floats(c.pitch);
        if (backward) sums[f] = (double*)arena.floats(size_t(taps + 1) * c.pitch * 2);
      }
      x = arena.floats(size_t(CONV_TILE + 2 * halo) * c.pitch);
      y = arena.floats(size_t(CONV_TILE + halo) * c.pitch);
      if (backward) {
        dx = arena.floats(size_t(CONV_TILE) * c.pitch);
        dy = arena.floats(size_t(CONV_TILE + halo) * c.pitch);
      }
      if (pass == 0 && !(arena = {storm_workspace(arena.used), 0}).base) return false;
    }
    for (int f = 0; f < a.filters; f++) {
      load_filter(f);
      if (backward) memset(sums[f], 0, sizeof(double) * (taps + 1) * c.pitch);
    }
    return true;
  }

  void load_filter(int f) {
    memset(w[f], 0, sizeof(float) * taps * c.pitch);
    memset(bias[f], 0, sizeof(float) * c.pitch);
    for (int e = 0; e < c.width; e++) {
      for (int k = 0; k < taps; k++) w[f][k * c.pitch + e] = a.filter[f].weight.data[(c.first + e) * taps + k];
      if (a.filter[f].bias.data) bias[f][e] = a.filter[f].bias.data[c.first + e];
    }
  }

  // Index into the initial state of a position outside the sequence, or -1 where it is not on the
  // filter's side.
  int64_t state_tap(int64_t position) const {
    if (a.filter[0].reverse) return position >= q.length ? q.length + halo - 1 - position : -1;
    return position < 0 ? position + halo : -1;
  }

  // Rows of the sequence from position `from` on, outside ones too.
  void load_positions(int64_t from, int64_t count, float* to) {
    int64_t inside = from < 0 ? 0 : from, end = from + count < q.length ? from + count : q.length;
    if (inside < end)
      load_rows(scan_rows(a.x, q, false, c.first, c.width).skip(inside), (int)(end - inside),
          to + (inside - from) * c.pitch, c.pitch);
    for (int64_t i = 0; i < count; i++) {
      if (from + i >= 0 && from + i < q.length) continue;
      float* row = to + i * c.pitch;
      memset(row, 0, sizeof(float) * c.pitch);
      int64_t tap = a.initial_state.data ? state_tap(from + i) : -1;
      if (tap < 0) continue;
      for (int e = 0; e < c.width; e++)
        row[e] = a.initial_state.data[((sequence * a.shape.channels) + c.first + e) * halo + tap];
    }
  }

  // Filter f's output at `count` positions, before SiLU, by way of `then` into y; `tile` is the row
  // of x that holds the first of them.
  template <class Then>
  void apply(int f, const float* tile, int count, Then then) {
    bool reverse = a.filter[f].reverse;
    filter_rows_any(
        tile + (reverse ? halo : -halo) * c.pitch, reverse ? -1 : 1, w[f], bias[f], taps, count, c.pitch, y, then);
  }

  void run_forward() {
    for (int64_t first = 0; first < q.length; first += CONV_TILE) {
      int count = (int)(q.length - first < CONV_TILE ? q.length - first : CONV_TILE);
      load_positions(first - halo, count + 2 * halo, x);
      const int64_t ahead = first + 2 * CONV_TILE + halo <= q.length ? first + CONV_TILE + halo : first;
      const Rows next = scan_rows(a.x, q, false, c.first, c.width).skip(ahead);
      for (int f = 0; f < a.filters; f++) {
        const Rows out = scan_rows(a.filter[f].out, q, false, c.first, c.width).skip(first);
        apply(f, x + halo * c.pitch, count, [&](vf v, int i, int j) INLINE_LAMBDA {
          prefetch(next, i, j);
          prefetch(out, i, j);
          return a.silu ? silu(v) : v;
        });
        store_rows(out, count, y, c.pitch);
      }
    }
  }

  void run_backward() {
    bool extend = a.grad_initial_state.data, reverse = a.filter[0].reverse;
    int64_t begin = extend && !reverse ? -halo : 0, end = q.length + (extend && reverse ? halo : 0);
    for (int64_t first = begin; first < end; first += CONV_TILE) {
      int count = (int)(end - first < CONV_TILE ? end - first : CONV_TILE);
      load_positions(first - halo, count + 2 * halo, x);
      memset(dx, 0, sizeof(float) * count * c.pitch);
      for (int f = 0; f < a.filters; f++) run_backward_filter(f, first, count);
      write_dx(first, count);
    }
  }

  // Gradients through filter f of the positions first ... first + count - 1: from the outputs they
  // reach, the tile's and `halo` more on one side.
  void run_backward_filter(int f, int64_t first, int count) {
    bool reverse = a.filter[f].reverse;
    int64_t from = reverse ? first - halo : first;
    load_gradient(f, from, count + halo);
    if (a.silu) {
      apply(f, x + (reverse ? 0 : halo) * c.pitch, count + halo, [](vf v, int, int) INLINE_LAMBDA { return v; });
      for (int j = 0; j < (count + halo) * c.pitch; j += LANES) {
        vf v = load(y + j);
        store(dy + j, silu_backward(load(dy + j), v, sigmoid(v)));
      }
    }
    const float* own = dy + (reverse ? halo : 0) * c.pitch;
    add_to_sums(f, own, count);
    // dx[t] += sum_k w[k] dy[t + halo - k], mirrored in reverse
    for (int i = 0; i < count; i++)
      for (int j = 0; j < c.pitch; j += LANES) {
        vf total = load(dx + i * c.pitch + j);
        for (int k = 0; k < taps; k++)
          total += load(w[f] + k * c.pitch + j) * load(own + (i + (reverse ? k - halo : halo - k)) * c.pitch + j);
        store(dx + i * c.pitch + j, total);
      }
  }

  // The gradient of filter f's output at `count` positions from `from` on, zero outside the
  // sequence, into dy.
  void load_gradient(int f, int64_t from, int64_t count) {
    int64_t inside = from < 0 ? 0 : from, end = from + count < q.length ? from + count : q.length;
    memset(dy, 0, sizeof(float) * count * c.pitch);
    if (inside >= end) return;
    load_rows(scan_rows(a.filter[f].out, q, false, c.first, c.width).skip(inside), (int)(end - inside),
        dy + (inside - from) * c.pitch, c.pitch);
  }

  // dw[k] += sum_i dy[i] x[i + k - halo], mirrored in reverse; dbias += sum_i dy[i]; `own` is the
  // row of dy at the tile's first position. In float64, where the products are exact: millions of
  // terms of either sign can leave a small sum.
  void add_to_sums(int f, const float* own, int count) {
    if (taps == 4) return add_taps<4, true>(f, own, count, 0);
    add_taps<1, true>(f, own, count, 0);
    for (int k = 1; k < taps; k++) add_taps<1, false>(f, own, count, k);
  }

  // TAPS weights from the k-th on, and the bias.
  template <int TAPS, bool BIAS>
  void add_taps(int f, const float* own, int count, int k) {
    const int step = a.filter[f].reverse ? -1 : 1;
    for (int j = 0; j < c.pitch; j += WIDE_LANES) {
      const float* from = x + (halo + step * (k - halo)) * c.pitch + j;
      double *sum = sums[f] + k * c.pitch + j, *bias_sum = sums[f] + taps * c.pitch + j;
      vd total[TAPS], bias_total = {};
      for (int n = 0; n < TAPS; n++) total[n] = load_wide(sum + n * c.pitch);
      if (BIAS) bias_total = load_wide(bias_sum);
      for (int i = 0; i < count; i++) {
        const vd d = load_widened(own + i * c.pitch + j);
#pragma GCC unroll 4
        for (int n = 0; n < TAPS; n++) total[n] += d * load_widened(from + (i + step * n) * c.pitch);
        if (BIAS) bias_total += d;
      }
      for (int n = 0; n < TAPS; n++) store_wide(sum + n * c.pitch, total[n]);
      if (BIAS) store_wide(bias_sum, bias_total);
    }
  }

  // dx of the positions inside goes to the gradient of x, of those outside to that of the initial
  // state.
  void write_dx(int64_t first, int count) {
    int64_t inside = first < 0 ? 0 : first, end = first + count < q.length ? first + count : q.length;
    if (a.grad_x.data && inside < end)
      store_rows(scan_rows(a.grad_x, q, false, c.first, c.width).skip(inside), (int)(end - inside),
          dx + (inside - first) * c.pitch, c.pitch);
    for (int i = 0; a.grad_initial_state.data && i < count; i++) {
      if (first + i >= 0 && first + i < q.length) continue;
      int64_t tap = state_tap(first + i);
      for (int e = 0; tap >= 0 && e < c.width; e++)
        a.grad_initial_state.data[(sequence * a.shape.channels + c.first + e) * halo + tap] = dx[i * c.pitch + e];
    }
  }

  // The span's sums: (spans, E, K) weights and (spans, E) biases.
  void write_sums(int f, int64_t span, double* weights, double* biases) {
    int64_t at = span * a.shape.channels + c.first;
    for (int e = 0; e < c.width; e++) {
      for (int k = 0; k < taps; k++) weights[(at + e) * taps + k] = sums[f][k * c.pitch + e];
      biases[at + e] = sums[f][taps * c.pitch + e];
    }
  }
};

int run_conv(const StormConv& a) {
  int64_t sequences = storm_sequence_count(a.shape), channels = a.shape.channels;
  int width = narrowed(CHUNK_WIDTH, sequences, channels, 1, a.shape.threads), failed = 0;
  int64_t chunks = chunks_per_group(channels, 1, width);
#pragma omp parallel num_threads((int)a.shape.threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < sequences * chunks; item++) {
      ConvWork work(a, chunk_at(item % chunks, channels, 1, width));
      work.sequence = item / chunks;
      work.q = storm_sequence(a.shape, work.sequence);
      if (work.allocate(false)) work.run_forward();
      else {
#pragma omp atomic write
        failed = 1;
      }
    }
    storm_trim_workspace();
  }
  return failed ? STORM_NO_MEMORY : STORM_OK;
}

int run_conv_backward(const StormConv& a, int64_t spans, double* weights[2], double* biases[2]) {
  int64_t sequences = storm_sequence_count(a.shape), channels = a.shape.channels;
  int width = narrowed(CHUNK_WIDTH, spans, channels, 1, a.shape.threads), failed = 0;
  int64_t chunks = chunks_per_group(channels, 1, width);
#pragma omp parallel num_threads((int)a.shape.threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < spans * chunks; item++) {
      int64_t span = item / chunks;
      ConvWork work(a, chunk_at(item % chunks, channels, 1, width));
      if (!work.allocate(true)) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      for (work.sequence = span * sequences / spans; work.sequence < (span + 1) * sequences / spans; work.sequence++) {
        work.q = storm_sequence(a.shape, work.sequence);
        work.run_backward();
      }
      for (int f = 0; f < a.filters; f++) work.write_sums(f, span, weights[f], biases[f]);
    }
    storm_trim_workspace();
  }
  return failed ? STORM_NO_MEMORY : STORM_OK;
}

}  // namespace

STORM_EXPORT(storm_conv)(StormConv* args) {
  if ((args->refused = storm_refused_by_conv(*args))) return STORM_REFUSED;
  return run_conv(*args);
}

STORM_EXPORT(storm_conv_backward)(StormConv* args) {
  if ((args->refused = storm_refused_by_conv(*args))) return STORM_REFUSED;
  const StormConv& a = *args;
  int64_t sequences = storm_sequence_count(a.shape), spans = sequences < MOST_SPANS ? sequences : MOST_SPANS,
          per_span = a.shape.channels * (a.taps + 1);
  double* all = (double*)storm_fresh(sizeof(double) * (a.filters * spans * per_span + 1));
  if (!all) return STORM_NO_MEMORY;
  double *weights[2], *biases[2];
  for (int f = 0; f < a.filters; f++) {
    weights[f] = all + f * spans * per_span;
    biases[f] = weights[f] + spans * a.shape.channels * a.taps;
  }
  int status = run_conv_backward(a, spans, weights, biases);
  for (int f = 0; status == STORM_OK && f < a.filters; f++) {
    add_spans(a.filter[f].grad_weight.data, weights[f], spans, a.shape.channels * a.taps);
    add_spans(a.filter[f].grad_bias.data, biases[f], spans, a.shape.channels);
  }
  free(all);
  return status;
}
