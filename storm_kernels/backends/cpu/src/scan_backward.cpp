// Backward selective scan. Its tile is an interval: the tokens from a checkpoint to the next. A
// thread takes a chunk of channels through them from the last to the first. It recomputes the states
// of an interval from its checkpoint; then the adjoint
//   g_i = dy_i C_i + exp(delta_{i+1} A) g_{i+1}      (gradient of the state after token i)
// runs back through it. Sums over channels (dB, dC) go to one partial result a chunk, sums over
// tokens (dA, dD, d delta_bias) to one a span of sequences. Partial results are added in a fixed
// order that depends on shapes only, so results do not depend on the threads.
// The pieces share the scratch memory of an interval and are one pass: so they stand in one file.
#include <stdlib.h>

#include <initializer_list>

#include "scan_adjoint.h"

namespace {

// The call's partial results, which its threads share.
struct Partials {
  float* BC[2];  // per direction (chunks, batch * L, 2 S): dB, then dC
  float* A[2];   // per direction (spans, E, S)
  float *D[2], *bias[2];  // per direction (spans, E)
};

// How the work is cut: by shapes alone, never by the number of threads.
struct Layout {
  int width;
  int64_t chunks, sequences, spans;
  explicit Layout(const StormScan& a) {
    int64_t size = a.shape.channels / a.groups, wanted = (size + 31) / 32;
    width = round_up(wanted < 16 ? 16 : wanted > 128 ? 128 : wanted, 16);
    chunks = a.groups * chunks_per_group(a.shape.channels, a.groups, width);
    sequences = storm_sequence_count(a.shape);
    int64_t most = chunks < 64 ? 64 / chunks : 1;
    spans = sequences < most ? sequences : most;
  }
};

// One direction's sums over tokens for one chunk; A as [block][state][lane].
struct Sums {
  float *A, *A_error, *D, *D_error, *bias, *bias_error;
  void take(Arena& arena, int pitch, int64_t states) {
    for (float** piece : {&A, &A_error}) *piece = arena.floats(pitch * states);
    for (float** piece : {&D, &D_error, &bias, &bias_error}) *piece = arena.floats(pitch);
  }
  void clear(int pitch, int64_t states) {
    for (float* piece : {A, A_error}) memset(piece, 0, sizeof(float) * pitch * states);
    for (float* piece : {D, D_error, bias, bias_error}) memset(piece, 0, sizeof(float) * pitch);
  }
};

// One thread's work: a chunk of channels through the sequences of a span.
struct BackwardWork {
  const StormScan& a;
  const StormScanGrads& grads;
  const StormTokenMap* map;  // null without a reduction
  const Partials& partials;
  int64_t chunk, sequence;
  Chunk c;
  StormSequence q;
  Parameters parameters[2];
  Sums sums[2];
  Tile tile;
  float *dy, *dout, *gate, *y, *d_input, *d_delta;  // [token][pitch]
  float *h, *decay, *sum_B, *sum_C;                 // see Block
  float *g;                                         // [block][state][lane]
  float* first_y;  // [token of the sequence][pitch]: the first of two directions' y, for the gradient of z; else null

  BackwardWork(const StormScan& args, const StormScanGrads& to, const StormTokenMap* token_map, const Partials& shared,
      const Layout& cut, int64_t chunk_index)
      : a(args),
        grads(to),
        map(token_map),
        partials(shared),
        chunk(chunk_index),
        c(chunk_at(chunk, a.shape.channels, a.groups, cut.width)) {}

  void take(Arena& arena, int64_t longest) {
    size_t plane = size_t(INTERVAL) * c.pitch, per_block = size_t(INTERVAL) * a.states * LANES;
    for (int d = 0; d < a.directions; d++) {
      parameters[d].take(arena, c.pitch, a.states);
      sums[d].take(arena, c.pitch, a.states);
    }
    tile.take(arena, INTERVAL, c.pitch, a.states, true);
    for (float** piece : {&dy, &dout, &gate, &y, &d_input, &d_delta}) *piece = arena.floats(plane);
    for (float** piece : {&decay, &sum_B, &sum_C}) *piece = arena.floats(per_block);
    h = arena.floats(per_block + a.states * LANES);
    g = arena.floats(c.pitch * a.states);
    first_y = grads.z.data && a.directions == 2 ? arena.floats(longest * c.pitch) : nullptr;
  }

  bool run(int64_t span, int64_t from, int64_t to) {
    int64_t longest = 0;
    for (int64_t s = from; s < to; s++) {
      int64_t length = storm_sequence(a.shape, s).length;
      if (length > longest) longest = length;
    }
    Arena measure = {nullptr, 0};
    take(measure, longest);
    Arena arena = {storm_workspace(measure.used), 0};
    if (!arena.base) return false;
    take(arena, longest);
    for (int d = 0; d < a.directions; d++) {
      load_parameters(parameters[d], a.direction[d], c, a.states);
      sums[d].clear(c.pitch, a.states);
    }
    for (sequence = from; sequence < to; sequence++) {
      q = storm_sequence(a.shape, sequence);
      for (int d = 0; d < a.directions; d++) run_direction(d);
    }
    for (int d = 0; d < a.directions; d++) write_sums(d, span);
    return true;
  }

  void run_direction(int d) {
    const StormDirection& direction = a.direction[d];
    load_states(grads.final_state.data, sequence, a.shape.channels, c, a.states, g);
    ScanRows rows = direction_rows(direction, q, c, a.states);
    for (int64_t index = (q.length + INTERVAL - 1) / INTERVAL - 1; index >= 0; index--) {
      int64_t first = index * INTERVAL;
      int count = (int)(q.length - first < INTERVAL ? q.length - first : INTERVAL);
      load_tile(tile, rows, first, count, c, parameters[d], a.softplus);
      load_output_gradient(direction.reverse, first, count);
      run_blocks(d, index, count);
      write_inputs(d, first, count);
      if (partials.BC[d]) write_partial_BC(d, first, count);
      if (grads.z.data) write_gate(d, first, count);
    }
    if (grads.initial_state.data) store_states(grads.initial_state.data, sequence, a.shape.channels, c, a.states, g);
  }

  int64_t token(bool reverse, int64_t i) const { return reverse ? q.length - 1 - i : i; }

  // Loads dout, the gradient of the gated output, each cell's divided among its tokens; and makes dy,
  // the gradient of y before the gate.
  void load_output_gradient(bool reverse, int64_t first, int count) {
    load_token_rows(a.out, map ? map->cell : nullptr, q, reverse, first, count, c, dout);
    if (map)
      for (int i = 0; i < count; i++) {
        int64_t cell = map->cell[token(reverse, first + i)];
        float tokens_of_cell = cell < 0 ? 1.0f : map->count[cell];
        for (int j = i * c.pitch; j < (i + 1) * c.pitch; j += LANES) store(dout + j, load(dout + j) / tokens_of_cell);
      }
    if (a.z.data) load_token_rows(a.z, a.z_is_kept ? map->kept : nullptr, q, reverse, first, count, c, gate);
    for (int j = 0; j < count * c.pitch; j += LANES)
      store(dy + j, a.z.data ? load(dout + j) * silu(load(gate + j)) : load(dout + j));
  }

  void run_blocks(int d, int64_t index, int count) {
    const Parameters& p = parameters[d];
    size_t plane = sizeof(float) * count * c.pitch, per_block = sizeof(float) * count * a.states * LANES;
    memset(d_input, 0, plane);
    memset(d_delta, 0, plane);
    memset(sum_B, 0, per_block);
    memset(sum_C, 0, per_block);
    for (int j = 0; j < c.pitch; j += LANES) {
      int64_t at = j * a.states;
      Block b = {tile.delta + j, tile.u + j, dy + j, tile.B, tile.C, p.A + at, p.unit[j / LANES], h, decay,
          grads.z.data ? y + j : nullptr, sum_B, sum_C, g + at, d_input + j, d_delta + j, sums[d].A + at,
          sums[d].A_error + at, c.pitch, c.pitch, tile.bc_pitch, count, a.states};
      read_checkpoint(a.direction[d], index, j);
      bool decay = decays_only(b.delta, c.pitch, count, load(p.lowest + j), load(p.highest + j));
      decay ? recompute<true>(b) : recompute<false>(b);
      run_adjoint(b);
    }
  }

  // All states of a block, STATE_RUN at a time.
  static void run_adjoint(Block b) {
    for (int64_t begin = 0; begin < b.states; begin += STATE_RUN) {
      const int64_t end = b.states - begin < STATE_RUN ? b.states : begin + STATE_RUN;
      float* const totals[2] = {b.d_input, b.d_delta};
      float run[2][INTERVAL * LANES] = {};
      Block part = b;
      part.d_input = run[0], part.d_delta = run[1], part.d_pitch = LANES;
      int64_t s = begin;
      for (; s + 4 <= end; s += 4) adjoint<4>(part, s);
      for (; s < end; s++) adjoint<1>(part, s);
      for (int n = 0; n < 2; n++)
        for (int i = 0; i < b.count; i++)
          store(totals[n] + i * b.pitch, load(totals[n] + i * b.pitch) + load(run[n] + i * LANES));
    }
  }

  void read_checkpoint(const StormDirection& direction, int64_t index, int j) {
    const float* from =
        direction.checkpoints.data + (q.first_checkpoint + index) * a.states * a.shape.channels + c.first + j;
    int width = c.width - j < LANES ? c.width - j : LANES;
    for (int64_t s = 0; s < a.states; s++, from += a.shape.channels) {
      float lanes[LANES] = {};
      memcpy(lanes, from, sizeof(float) * width);
      store(h + s * LANES, load(lanes));
    }
  }

  // Writes the gradients of u and of delta before bias and softplus; adds to those of D and the bias.
  void write_inputs(int d, int64_t first, int count) {
    const Parameters& p = parameters[d];
    for (int j = 0; j < c.pitch; j += LANES) {
      vf D = load(p.D + j), sum_D = {}, sum_bias = {};
      for (int i = 0; i < count; i++) {
        int k = i * c.pitch + j;
        vf dy_ = load(dy + k), u = load(tile.u + k), from_input = load(d_input + k), raw = load(tile.raw + k);
        vf slope = a.softplus ? (raw > 20.0f ? splat(1.0f) : sigmoid(raw)) : splat(1.0f);
        vf d_raw = (load(d_delta + k) + from_input * u) * slope;
        store(d_delta + k, d_raw);
        store(d_input + k, from_input * load(tile.delta + k) + dy_ * D);
        sum_bias += d_raw;
        sum_D += dy_ * u;
        if ((i + 1) % SUM_RUN && i + 1 < count) continue;
        add_compensated(sums[d].D + j, sums[d].D_error + j, sum_D);
        add_compensated(sums[d].bias + j, sums[d].bias_error + j, sum_bias);
        sum_D = sum_bias = vf{};
      }
    }
    bool reverse = a.direction[d].reverse;
    const StormDirectionGrads& to = grads.direction[d];
    if (to.u.data) store_rows(scan_rows(to.u, q, reverse, c.first, c.width).skip(first), count, d_input, c.pitch);
    if (to.delta.data)
      store_rows(scan_rows(to.delta, q, reverse, c.first, c.width).skip(first), count, d_delta, c.pitch);
  }

  void write_partial_BC(int d, int64_t first, int count) {
    int64_t tokens = a.shape.batch * a.shape.length, before = q.batch * a.shape.length + q.start;
    for (int i = 0; i < count; i++) {
      float* to = partials.BC[d] + (chunk * tokens + before + token(a.direction[d].reverse, first + i)) * 2 * a.states;
      for (int64_t s = 0; s < a.states; s++) {
        to[s] = sum(load(sum_B + (i * a.states + s) * LANES));
        to[a.states + s] = sum(load(sum_C + (i * a.states + s) * LANES));
      }
    }
  }

  // Gradient of z: dout silu'(z) times y, in the last direction, where the y of all is known.
  void write_gate(int d, int64_t first, int count) {
    const StormDirection& direction = a.direction[d];
    const Parameters& p = parameters[d];
    for (int i = 0; i < count; i++) {
      int64_t l = token(direction.reverse, first + i);
      for (int j = 0; j < c.pitch; j += LANES) {
        int k = i * c.pitch + j;
        vf total = load(y + k);
        if (p.has_D) total += load(p.D + j) * load(tile.u + k);
        float* earlier = first_y ? first_y + l * c.pitch + j : nullptr;
        if (earlier && d == 0) store(earlier, total);
        else if (earlier) total += load(earlier);
        vf z = load(gate + k);
        store(y + k, silu_backward(load(dout + k) * total, z, sigmoid(z)));
      }
      int64_t row = a.z_is_kept ? map->kept[l] : q.start + l;
      if (d == a.directions - 1 && row >= 0) store_rows(row_at(grads.z, q.batch, row, c), 1, y + i * c.pitch, c.pitch);
    }
  }

  void write_sums(int d, int64_t span) {
    int64_t at = span * a.shape.channels + c.first;
    store_states(partials.A[d], span, a.shape.channels, c, a.states, sums[d].A);
    memcpy(partials.D[d] + at, sums[d].D, sizeof(float) * c.width);
    memcpy(partials.bias[d] + at, sums[d].bias, sizeof(float) * c.width);
  }
};

// dB and dC of one token and group: the partials of the group's chunks, first to last.
void add_chunks(const StormScan& a, const StormDirectionGrads& to, const float* partial, const Layout& cut,
    int64_t row, int64_t group, float* total) {
  int64_t tokens = a.shape.batch * a.shape.length, per_group = cut.chunks / a.groups, width = 2 * a.states;
  memset(total, 0, sizeof(float) * width);
  for (int64_t chunk = group * per_group; chunk < (group + 1) * per_group; chunk++) {
    const float* from = partial + (chunk * tokens + row) * width;
    for (int64_t i = 0; i < width; i++) total[i] += from[i];
  }
  Chunk states = {group, 0, (int)a.states, (int)a.states};
  const StormTensor* tensors[2] = {&to.B, &to.C};
  for (int i = 0; i < 2; i++) {
    if (!tensors[i]->data) continue;
    Rows out = row_at(*tensors[i], 0, 0, states);
    out.data += element_size(out.dtype) * (row * tensors[i]->row_stride + group * tensors[i]->group_stride);
    store_rows(out, 1, total + i * a.states, (int)a.states);
  }
}

// The whole call, given its partial sums.
int run_backward(const StormScan& a, const StormScanGrads& grads, const StormTokenMap* map, const Partials& partials,
    const Layout& cut) {
  int failed = 0;
#pragma omp parallel num_threads((int)a.shape.threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < cut.spans * cut.chunks; item++) {
      int64_t chunk = item % cut.chunks, span = item / cut.chunks;
      BackwardWork work(a, grads, map, partials, cut, chunk);
      if (!work.run(span, span * cut.sequences / cut.spans, (span + 1) * cut.sequences / cut.spans)) {
#pragma omp atomic write
        failed = 1;
      }
    }
    float* total = (float*)storm_workspace(sizeof(float) * (2 * a.states + LANES));
    if (!total) {
#pragma omp atomic write
      failed = 1;
    }
    for (int d = 0; d < a.directions; d++) {
      if (!partials.BC[d]) continue;
#pragma omp for schedule(static)
      for (int64_t row = 0; row < a.shape.batch * a.shape.length; row++)
        for (int64_t group = 0; total && group < a.groups; group++)
          add_chunks(a, grads.direction[d], partials.BC[d], cut, row, group, total);
    }
    storm_trim_workspace();
  }
  return failed ? STORM_NO_MEMORY : STORM_OK;
}

}  // namespace

STORM_EXPORT(storm_scan_backward)(StormScan* args, const StormScanGrads* grads) {
  if ((args->refused = storm_refused_by_scan_backward(*args, *grads))) return STORM_REFUSED;
  const StormScan& a = *args;
  StormTokenMap map = {};
  if (a.reduction.frames && !storm_build_token_map(a.reduction, &map)) return STORM_NO_MEMORY;
  Layout cut(a);
  Partials partials = {};
  bool allocated = true;
  for (int d = 0; d < a.directions; d++) {
    int64_t per_span = cut.spans * a.shape.channels, rows = cut.chunks * a.shape.batch * a.shape.length;
    if (grads->direction[d].B.data || grads->direction[d].C.data)
      allocated &= (partials.BC[d] = (float*)storm_fresh(sizeof(float) * (rows * 2 * a.states + 1))) != nullptr;
    allocated &= (partials.A[d] = (float*)storm_fresh(sizeof(float) * per_span * (a.states + 2))) != nullptr;
    partials.D[d] = partials.A[d] + per_span * a.states;
    partials.bias[d] = partials.D[d] + per_span;
  }
  int status = allocated ? run_backward(a, *grads, a.reduction.frames ? &map : nullptr, partials, cut)
                         : (int)STORM_NO_MEMORY;
  for (int d = 0; d < a.directions; d++) {
    if (status == STORM_OK) {
      add_spans(grads->direction[d].A.data, partials.A[d], cut.spans, a.shape.channels * a.states);
      add_spans(grads->direction[d].D.data, partials.D[d], cut.spans, a.shape.channels);
      add_spans(grads->direction[d].delta_bias.data, partials.bias[d], cut.spans, a.shape.channels);
    }
    free(partials.BC[d]);
    free(partials.A[d]);
  }
  storm_free_token_map(&map);
  return status;
}
