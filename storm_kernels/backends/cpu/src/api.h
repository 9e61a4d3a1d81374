// The plain C interface: structures that `structs.py` fills in through ctypes. Strides are in
// elements; offsets are 64-bit. Each buffer comes with the number of elements that its memory holds;
// a call whose buffers hold too few is refused before it reads or writes. Each instruction-set
// variant exports the same functions with its own suffix (storm_scan_avx2, ...). Words are those of
// storm_kernels/backends/contract.py.
#pragma once
#include <stdint.h>

enum { STORM_FLOAT32 = 0, STORM_BFLOAT16 = 1, STORM_FLOAT16 = 2 };
enum { STORM_OK = 0, STORM_NO_MEMORY = 1, STORM_REFUSED = 2 };  // refused: the structure's `refused` names the buffer

// Tokens from a checkpoint of the scan to the next: an interval. `checkpoint_shapes` in scan.py reads
// the number through storm_checkpoint_interval().
enum { STORM_INTERVAL = 64 };

// (batch, rows, channels) or (batch, rows, groups, states), the last axis of stride 1; data is null
// where the tensor is absent.
typedef struct {
  void* data;
  int64_t count;  // elements from `data` to the end of its memory
  int64_t batch_stride, row_stride, group_stride;
  int64_t dtype;
} StormTensor;

// A contiguous float32 tensor; data is null where it is absent.
typedef struct {
  float* data;
  int64_t count;
} StormFloats;

// docs/spec.md, Token reduction: a (frames, height, width) grid, pooled and sampled; frames is 0
// without a reduction.
typedef struct {
  int64_t frames, height, width, temporal_pool, spatial_pool, temporal_stride;
} StormReduction;

// One sequence per batch entry, or `sequences` packed ones in a batch of 1 with offsets
// cu_seqlens[0 .. sequences].
typedef struct {
  int64_t batch, length, channels, sequences;
  const int64_t* cu_seqlens;
  int64_t threads;
} StormShape;

typedef struct {
  StormTensor u, delta, B, C;
  StormFloats A, D, delta_bias;  // (E, S), (E,), (E,)
  // (intervals of all sequences, S, E): the state before each interval's first token in scan order
  StormFloats checkpoints;
  int64_t reverse;
} StormDirection;

typedef struct {
  StormShape shape;
  StormReduction reduction;
  StormDirection direction[2];
  StormTensor z, out;  // in the backward pass `out` is the incoming gradient
  StormFloats initial_state;  // (sequences, E, S)
  StormFloats final_state;    // likewise
  int64_t states, groups, directions, softplus;
  int64_t z_is_kept;  // whether z holds the kept tokens only
  const char* refused;
} StormScan;

// Null where not asked for; u, delta, B, C, z are contiguous and in the dtype of what they are
// gradients of.
typedef struct {
  StormTensor u, delta, B, C;
  StormFloats A, D, delta_bias;
} StormDirectionGrads;

typedef struct {
  StormDirectionGrads direction[2];
  StormTensor z;
  StormFloats final_state;    // incoming
  StormFloats initial_state;  // outgoing
} StormScanGrads;

typedef struct {
  StormFloats weight, bias;  // (E, K), (E,)
  StormTensor out;           // in the backward pass the incoming gradient
  StormFloats grad_weight, grad_bias;
  int64_t reverse;
} StormFilter;

typedef struct {
  StormShape shape;
  StormTensor x, grad_x;
  StormFilter filter[2];
  StormFloats initial_state;  // (sequences, E, K - 1)
  StormFloats grad_initial_state;
  int64_t filters, taps, silu;
  const char* refused;
} StormConv;

typedef struct {
  StormReduction reduction;
  StormTensor x, out;
  int64_t batch, channels, threads;
  const char* refused;
} StormReduce;
