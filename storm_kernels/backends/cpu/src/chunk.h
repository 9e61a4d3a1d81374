// How tensors are cut: chunks of channels, rows in scan order, pieces of a workspace.
//
// Words beside those of storm_kernels/backends/contract.py. Chunk: channels of one group that one
// thread takes through time. Block: LANES channels of a chunk, one vector. Span: sequences beside
// each other whose sums one thread adds up. In a workspace:
//
//     tile             [token][channel]          | block 0 | block 1 | ...      pitch floats a token
//     states, A        [block][state][lane]      | state 0 | state 1 | ... of block 0 | state 0 ...
#pragma once
#include "common.h"
#include "vec.h"

namespace {

struct Chunk {
  int64_t group, first;  // first: its first channel
  int width, pitch;      // its channels; the same rounded up to whole vectors
  int blocks() const { return pitch / LANES; }
};

INLINE int64_t chunks_per_group(int64_t channels, int64_t groups, int chunk_width) {
  return (channels / groups + chunk_width - 1) / chunk_width;
}

INLINE Chunk chunk_at(int64_t index, int64_t channels, int64_t groups, int chunk_width) {
  int64_t per_group = chunks_per_group(channels, groups, chunk_width), size = channels / groups;
  int64_t group = index / per_group, offset = index % per_group * chunk_width;
  int width = (int)(size - offset < chunk_width ? size - offset : chunk_width);
  return {group, group * size + offset, width, round_up(width, LANES)};
}

// The sequence's rows in scan order, from column `offset` on.
INLINE Rows scan_rows(const StormTensor& t, const StormSequence& q, bool reverse, int64_t offset, int width) {
  int64_t size = element_size(t.dtype), row = q.start + (reverse ? q.length - 1 : 0);
  char* data = (char*)t.data + size * (q.batch * t.batch_stride + row * t.row_stride + offset);
  return {data, (reverse ? -1 : 1) * t.row_stride * size, t.dtype, width};
}

// Row `row` of batch entry `batch`, from channel `first` on.
INLINE Rows row_at(const StormTensor& t, int64_t batch, int64_t row, const Chunk& c) {
  return {(char*)t.data + element_size(t.dtype) * (batch * t.batch_stride + row * t.row_stride + c.first), 0,
      t.dtype, c.width};
}

// Hands out 64-byte aligned pieces of a workspace; with a null workspace it only measures.
struct Arena {
  char* base;
  size_t used;
  float* floats(size_t count) {
    float* piece = base ? (float*)(base + used) : nullptr;
    used += (count * sizeof(float) + 63) / 64 * 64;
    return piece;
  }
};

// The rows of `t` of `count` tokens from position `first` on, in scan order. With a map, token l has
// row map[l], or zeros where that is -1.
void load_token_rows(const StormTensor& t, const int64_t* map, const StormSequence& q, bool reverse, int64_t first,
    int count, const Chunk& c, float* to) {
  if (!map) return load_rows(scan_rows(t, q, reverse, c.first, c.width).skip(first), count, to, c.pitch);
  for (int i = 0; i < count; i++, to += c.pitch) {
    int64_t row = map[reverse ? q.length - 1 - (first + i) : first + i];
    if (row < 0) memset(to, 0, sizeof(float) * c.pitch);
    else load_rows(row_at(t, q.batch, row, c), 1, to, c.pitch);
  }
}

// Halves a chunk's width until there are two chunks for each thread. Only for kernels where the result
// of a channel does not depend on its chunk.
INLINE int narrowed(int width, int64_t sequences, int64_t channels, int64_t groups, int64_t threads) {
  while (width > LANES && sequences * groups * chunks_per_group(channels, groups, width) < 2 * threads) width /= 2;
  return width;
}

// Sums over tokens, which can be millions: plain over SUM_RUN of them, then a running sum with its
// rounding error carried along (Kahan).
constexpr int SUM_RUN = 4;
INLINE void add_compensated(float* sum, float* error, vf value) {
  vf before = load(sum), corrected = value - load(error), after = before + corrected;
  store(error, (after - before) - corrected);
  store(sum, after);
}

// to[i] = sum over spans of partial[span][i], in that order; nothing where `to` is null.
template <class Partial>
INLINE void add_spans(float* to, const Partial* partial, int64_t spans, int64_t count) {
  for (int64_t i = 0; to && i < count; i++) {
    double total = 0.0;
    for (int64_t span = 0; span < spans; span++) total += partial[span * count + i];
    to[i] = (float)total;
  }
}

}  // namespace
