// Token reduction (docs/spec.md) and its gradient: averages over the frames of a pool and p x p tokens
// of each, for the pools that sampling keeps.
#include "chunk.h"

namespace {

constexpr int CHUNK_WIDTH = 512;  // channels summed at a time, in the first-level cache

// One cell of one batch entry, from its tokens.
bool average(const StormReduce& a, int64_t batch, int64_t frame, int64_t row, int64_t column, int64_t to) {
  const StormReduction& r = a.reduction;
  int64_t p = r.spatial_pool, t0 = frame * r.temporal_stride * r.temporal_pool;
  int64_t t1 = t0 + r.temporal_pool < r.frames ? t0 + r.temporal_pool : r.frames;
  int64_t i1 = (row + 1) * p < r.height ? (row + 1) * p : r.height,
          j1 = (column + 1) * p < r.width ? (column + 1) * p : r.width;
  float count = (float)((t1 - t0) * (i1 - row * p) * (j1 - column * p));
  float* sum = (float*)storm_workspace(sizeof(float) * 2 * CHUNK_WIDTH);
  if (!sum) return false;
  float* in = sum + CHUNK_WIDTH;
  for (int64_t index = 0; index < chunks_per_group(a.channels, 1, CHUNK_WIDTH); index++) {
    Chunk c = chunk_at(index, a.channels, 1, CHUNK_WIDTH);
    memset(sum, 0, sizeof(float) * c.pitch);
    for (int64_t t = t0; t < t1; t++)
      for (int64_t i = row * p; i < i1; i++)
        for (int64_t j = column * p; j < j1; j++) {
          load_rows(row_at(a.x, batch, (t * r.height + i) * r.width + j, c), 1, in, c.pitch);
          for (int e = 0; e < c.pitch; e += LANES) store(sum + e, load(sum + e) + load(in + e));
        }
    for (int e = 0; e < c.pitch; e += LANES) store(sum + e, load(sum + e) / count);
    store_rows(row_at(a.out, batch, to, c), 1, sum, c.pitch);
  }
  return true;
}

// The gradient of one token: its cell's, divided by the tokens of the cell; zero if it is dropped.
bool spread(const StormReduce& a, const StormTokenMap& map, int64_t batch, int64_t token) {
  float* row = (float*)storm_workspace(sizeof(float) * CHUNK_WIDTH);
  if (!row) return false;
  int64_t from = map.cell[token];
  for (int64_t index = 0; index < chunks_per_group(a.channels, 1, CHUNK_WIDTH); index++) {
    Chunk c = chunk_at(index, a.channels, 1, CHUNK_WIDTH);
    memset(row, 0, sizeof(float) * c.pitch);
    if (from >= 0) load_rows(row_at(a.out, batch, from, c), 1, row, c.pitch);
    for (int e = 0; from >= 0 && e < c.pitch; e += LANES) store(row + e, load(row + e) / map.count[from]);
    store_rows(row_at(a.x, batch, token, c), 1, row, c.pitch);
  }
  return true;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

STORM_EXPORT(storm_reduce)(StormReduce* args) {
  if ((args->refused = storm_refused_by_reduce(*args))) return STORM_REFUSED;
  const StormReduce& a = *args;
  const StormReduction& r = a.reduction;
  int64_t frames = ceil_div(ceil_div(r.frames, r.temporal_pool), r.temporal_stride);
  int64_t rows = ceil_div(r.height, r.spatial_pool), columns = ceil_div(r.width, r.spatial_pool),
          tokens = frames * rows * columns;
  int failed = 0;
#pragma omp parallel for num_threads((int)a.threads) schedule(static)
  for (int64_t item = 0; item < a.batch * tokens; item++) {
    int64_t to = item % tokens;
    if (!average(a, item / tokens, to / (rows * columns), to / columns % rows, to % columns, to)) {
#pragma omp atomic write
      failed = 1;
    }
  }
  return failed ? STORM_NO_MEMORY : STORM_OK;
}

// `out` holds the incoming gradient, `x` receives the outgoing one.
STORM_EXPORT(storm_reduce_backward)(StormReduce* args) {
  if ((args->refused = storm_refused_by_reduce(*args))) return STORM_REFUSED;
  const StormReduce& a = *args;
  StormTokenMap map = {};
  if (!storm_build_token_map(a.reduction, &map)) return STORM_NO_MEMORY;
  int failed = 0;
#pragma omp parallel for num_threads((int)a.threads) schedule(static)
  for (int64_t item = 0; item < a.batch * map.tokens; item++)
    if (!spread(a, map, item / map.tokens, item % map.tokens)) {
#pragma omp atomic write
      failed = 1;
    }
  storm_free_token_map(&map);
  return failed ? STORM_NO_MEMORY : STORM_OK;
}
