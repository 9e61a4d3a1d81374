// Forward selective scan (docs/spec.md, Mixer): sequential in time, channels across lanes, the
// states of a block in registers. One thread takes a chunk of channels of one sequence through all
// its tokens, tile after tile, first in one direction, then in the other. Within a tile block after
// block goes through the tokens.
#include "scan_tile.h"

namespace {

constexpr int SCAN_TILE = 32;     // tokens; delta, u and y of a chunk stay in the first-level cache
// Channels: whole cache lines of every row, and B and C converted once for many blocks
constexpr int CHUNK_WIDTH = 64;

// A block's columns of rows that it will read or write soon, for the prefetcher.
struct Soon {
  const char* data;
  int64_t step;
};

struct Block {
  const float *delta, *u, *B, *C, *A, *D;  // D null where absent
  float *y, *h;
  float unit;  // of A
  int pitch, bc_pitch, count;
  int64_t states;
  Soon soon[4];
};

// One block through one tile: h = exp(delta A) h + delta u B, y = C h + D u.
template <int STATES, bool WITH_Y, bool DECAY>
void scan_block(const Block& b) {
  constexpr int IN_REGISTERS = STATES ? STATES : 1;  // other numbers of states stay in memory
  const int64_t states = STATES ? STATES : b.states;
  vf h[IN_REGISTERS];
  if (STATES)
    for (int s = 0; s < IN_REGISTERS; s++) h[s] = load(b.h + s * LANES);
  const vf D = b.D ? load(b.D) : vf{};
  for (int i = 0; i < b.count; i++) {
#pragma GCC unroll 4
    for (const Soon& rows : b.soon) __builtin_prefetch(rows.data + i * rows.step);
    const vf delta = load(b.delta + i * b.pitch), u = load(b.u + i * b.pitch), delta_u = delta * u,
             rate = DECAY ? delta : delta * b.unit;
    const float *B = b.B + i * b.bc_pitch, *C = b.C + i * b.bc_pitch;
    vf even = {}, odd = {}, y = {};
    auto step = [&](int64_t s, vf before) INLINE_LAMBDA {
      vf exponent = rate * load(b.A + s * LANES);
      vf after = (DECAY ? exp2_in_range(exponent) : exp2_any(exponent)) * before + delta_u * B[s];
      if (WITH_Y) (s % 2 ? odd : even) += after * C[s];
      return after;
    };
    if (STATES) {
#pragma GCC unroll 16
      for (int s = 0; s < IN_REGISTERS; s++) h[s] = step(s, h[s]);
    } else {
      for (int64_t begin = 0; begin < states; begin += STATE_RUN) {
        const int64_t end = states - begin < STATE_RUN ? states : begin + STATE_RUN;
        for (int64_t s = begin; s < end; s++) store(b.h + s * LANES, step(s, load(b.h + s * LANES)));
        y += even + odd;
        even = odd = vf{};
      }
    }
    if (STATES) y = even + odd;
    if (WITH_Y) store(b.y + i * b.pitch, b.D ? y + D * u : y);
  }
  if (STATES)
    for (int s = 0; s < IN_REGISTERS; s++) store(b.h + s * LANES, h[s]);
}

template <int STATES>
void scan_block_any(const Block& b, bool with_y, bool decay) {
  if (with_y) decay ? scan_block<STATES, true, true>(b) : scan_block<STATES, true, false>(b);
  else decay ? scan_block<STATES, false, true>(b) : scan_block<STATES, false, false>(b);
}

// One thread's work: a chunk of channels of one sequence.
struct ScanWork {
  const StormScan& a;
  const StormTokenMap* map;  // null without a reduction
  StormSequence q;
  int64_t sequence;
  Chunk c;
  Parameters p;
  Tile tile;
  float *y, *gate, *h;
  // [row][pitch] float32: sums of cells, or the first direction's y where `out` cannot hold it; else
  // null
  float* sums;

  ScanWork(const StormScan& args, const StormTokenMap* token_map) : a(args), map(token_map) {}

  bool needs_sums() const { return map || (a.directions == 2 && a.out.dtype != STORM_FLOAT32); }
  int64_t sum_rows() const { return map ? map->cells : q.length; }

  void take(Arena& arena) {
    p.take(arena, c.pitch, a.states);
    tile.take(arena, SCAN_TILE, c.pitch, a.states, false);
    y = arena.floats(SCAN_TILE * c.pitch);
    gate = arena.floats(SCAN_TILE * c.pitch);
    h = arena.floats(c.pitch * a.states);
    sums = needs_sums() ? arena.floats(sum_rows() * c.pitch) : nullptr;
  }

  bool run() {
    Arena measure = {nullptr, 0};
    take(measure);
    Arena arena = {storm_workspace(measure.used), 0};
    if (!arena.base) return false;
    take(arena);
    if (map) memset(sums, 0, sizeof(float) * sum_rows() * c.pitch);
    for (int d = 0; d < a.directions; d++) run_direction(d);
    if (map) write_cells();
    return true;
  }

  void run_direction(int d) {
    const StormDirection& direction = a.direction[d];
    load_parameters(p, direction, c, a.states);
    load_states(a.initial_state.data, sequence, a.shape.channels, c, a.states, h);
    ScanRows rows = direction_rows(direction, q, c, a.states);
    for (int64_t first = 0; first < q.length; first += SCAN_TILE) {
      int count = (int)(q.length - first < SCAN_TILE ? q.length - first : SCAN_TILE);
      if (direction.checkpoints.data && first % STORM_INTERVAL == 0)
        write_checkpoint(direction, first / STORM_INTERVAL);
      load_tile(tile, rows, first, count, c, p, a.softplus);
      bool with_y = !map || any_kept(direction.reverse, first, count);
      scan_tile(rows, d, first, count, with_y);
      if (with_y) emit(d, first, count);
    }
    if (a.final_state.data) store_states(a.final_state.data, sequence, a.shape.channels, c, a.states, h);
  }

  void write_checkpoint(const StormDirection& direction, int64_t index) {
    float* to = direction.checkpoints.data + (q.first_checkpoint + index) * a.states * a.shape.channels + c.first;
    for (int64_t s = 0; s < a.states; s++, to += a.shape.channels)
      for (int e = 0; e < c.width; e++) to[e] = h[state_index(e, s, a.states)];
  }

  int64_t token(bool reverse, int64_t i) const { return reverse ? q.length - 1 - i : i; }

  bool any_kept(bool reverse, int64_t first, int count) const {
    for (int i = 0; i < count; i++)
      if (map->cell[token(reverse, first + i)] >= 0) return true;
    return false;
  }

  Rows out_rows(bool reverse, int64_t first) const {
    return scan_rows(a.out, q, reverse, c.first, c.width).skip(first);
  }
  // Where the first direction's y waits for the second one's.
  Rows partial_rows(bool reverse, int64_t first) const {
    if (!sums) return out_rows(reverse, first);
    return {(char*)(sums + token(reverse, first) * c.pitch), (reverse ? -1 : 1) * c.pitch * 4, STORM_FLOAT32, c.pitch};
  }

  void scan_tile(const ScanRows& rows, int d, int64_t first, int count, bool with_y) {
    int64_t ahead = first + 2 * SCAN_TILE <= q.length ? first + SCAN_TILE : first;
    const bool reverse = a.direction[d].reverse, last = d == a.directions - 1;
    Rows u = rows.u.skip(ahead), delta = rows.delta.skip(ahead), y_to = u, z = u;
    if (!map) y_to = last ? out_rows(reverse, first) : partial_rows(reverse, first);
    if (a.z.data && !a.z_is_kept && (map || last)) z = scan_rows(a.z, q, reverse, c.first, c.width).skip(first);
    for (int j = 0; j < c.pitch; j += LANES) {
      auto soon = [j](const Rows& r) { return Soon{r.data + j * element_size(r.dtype), r.step}; };
      Block b = {tile.delta + j, tile.u + j, tile.B, tile.C, p.A + j * a.states, p.has_D ? p.D + j : nullptr, y + j,
          h + j * a.states, p.unit[j / LANES], c.pitch, tile.bc_pitch, count, a.states,
          {soon(u), soon(delta), soon(y_to), soon(z)}};
      bool decay = decays_only(b.delta, c.pitch, count, load(p.lowest + j), load(p.highest + j));
      a.states == 16 ? scan_block_any<16>(b, with_y, decay) : scan_block_any<0>(b, with_y, decay);
    }
  }

  // Adds the other direction's y to a tile's, gates, and writes it. With a reduction it adds to the sums
  // of cells instead: they are linear in y, so each direction gates its own y.
  void emit(int d, int64_t first, int count) {
    const StormDirection& direction = a.direction[d];
    bool reverse = direction.reverse, last = d == a.directions - 1;
    if (!map && !last) return store_rows(partial_rows(reverse, first), count, y, c.pitch);
    if (!map && d > 0) {
      load_rows(partial_rows(reverse, first), count, gate, c.pitch);
      for (int j = 0; j < count * c.pitch; j += LANES) store(y + j, load(y + j) + load(gate + j));
    }
    if (a.z.data) {
      load_token_rows(a.z, a.z_is_kept ? map->kept : nullptr, q, reverse, first, count, c, gate);
      for (int j = 0; j < count * c.pitch; j += LANES) store(y + j, load(y + j) * silu(load(gate + j)));
    }
    if (!map) return store_rows(out_rows(reverse, first), count, y, c.pitch);
    for (int i = 0; i < count; i++) {
      int64_t cell = map->cell[token(reverse, first + i)];
      if (cell < 0) continue;
      float* sum = sums + cell * c.pitch;
      for (int j = 0; j < c.pitch; j += LANES) store(sum + j, load(sum + j) + load(y + i * c.pitch + j));
    }
  }

  void write_cells() {
    for (int64_t cell = 0; cell < map->cells; cell++) {
      float* sum = sums + cell * c.pitch;
      for (int j = 0; j < c.pitch; j += LANES) store(sum + j, load(sum + j) / map->count[cell]);
      store_rows(row_at(a.out, q.batch, cell, c), 1, sum, c.pitch);
    }
  }
};

}  // namespace

STORM_EXPORT(storm_scan)(StormScan* args) {
  if ((args->refused = storm_refused_by_scan(*args))) return STORM_REFUSED;
  StormTokenMap map = {};
  if (args->reduction.frames && !storm_build_token_map(args->reduction, &map)) return STORM_NO_MEMORY;
  int64_t sequences = storm_sequence_count(args->shape);
  int width = narrowed(CHUNK_WIDTH, sequences, args->shape.channels, args->groups, args->shape.threads);
  int64_t chunks = args->groups * chunks_per_group(args->shape.channels, args->groups, width);
  int failed = 0;
#pragma omp parallel num_threads((int)args->shape.threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < sequences * chunks; item++) {
      ScanWork work(*args, args->reduction.frames ? &map : nullptr);
      work.sequence = item / chunks;
      work.q = storm_sequence(args->shape, work.sequence);
      work.c = chunk_at(item % chunks, args->shape.channels, args->groups, width);
      if (!work.run()) {
#pragma omp atomic write
        failed = 1;
      }
    }
    storm_trim_workspace();
  }
  storm_free_token_map(&map);
  return failed ? STORM_NO_MEMORY : STORM_OK;
}
