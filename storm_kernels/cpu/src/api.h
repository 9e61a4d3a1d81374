// The plain C interface: what `launch.py` fills in through ctypes. Strides are in elements; offsets are 64-bit.
// Each instruction-set variant exports the same functions with its own suffix (storm_scan_avx2, ...).
#pragma once
#include <stdint.h>

enum { STORM_FLOAT32 = 0, STORM_BFLOAT16 = 1, STORM_FLOAT16 = 2 };
enum { STORM_OK = 0, STORM_NO_MEMORY = 1 };

// Tokens between two checkpoints of the scan; `checkpoint_shapes` in scan.py reads it through storm_checkpoint_interval().
enum { STORM_CHECKPOINT = 64 };

// (batch, rows, [groups,] channels), the last axis of stride 1; data is null where the tensor is absent.
typedef struct {
  void* data;
  int64_t batch_stride, row_stride, group_stride;
  int64_t dtype;
} StormTensor;

// SPEC.md, Token reduction: a (frames, height, width) grid, pooled and sampled; frames is 0 without a reduction.
typedef struct {
  int64_t frames, height, width, temporal_pool, spatial_pool, temporal_stride;
} StormReduction;

// One sequence per batch entry, or `sequences` packed ones in a batch of 1 with offsets cu_seqlens[0 .. sequences].
typedef struct {
  int64_t batch, length, channels, sequences;
  const int64_t* cu_seqlens;
  int64_t threads;
} StormShape;

typedef struct {
  StormTensor u, delta, B, C;
  const float *A, *D, *delta_bias;  // (E, S), (E,), (E,)
  float* checkpoints;               // (chunks of all sequences, S, E): the state before each STORM_CHECKPOINT-th scanned token
  int64_t reverse;
} StormDirection;

typedef struct {
  StormShape shape;
  StormReduction reduction;
  StormDirection direction[2];
  StormTensor z, out;  // in the backward pass `out` is the incoming gradient
  const float* initial_state;  // (sequences, E, S)
  float* final_state;          // likewise
  int64_t states, groups, directions, softplus;
  int64_t z_is_kept;  // z holds only the tokens that survive the sampling
} StormScan;

// Null where not asked for; u, delta, B, C, z are contiguous and in the dtype of what they are gradients of.
typedef struct {
  StormTensor u, delta, B, C;
  float *A, *D, *delta_bias;
} StormDirectionGrads;

typedef struct {
  StormDirectionGrads direction[2];
  StormTensor z;
  const float* final_state;  // incoming
  float* initial_state;      // outgoing
} StormScanGrads;

typedef struct {
  const float *weight, *bias;  // (E, K), (E,)
  StormTensor out;             // in the backward pass the incoming gradient
  float *grad_weight, *grad_bias;
  int64_t reverse;
} StormFilter;

typedef struct {
  StormShape shape;
  StormTensor x, grad_x;
  StormFilter filter[2];
  const float* initial_state;  // (sequences, E, K - 1)
  float* grad_initial_state;
  int64_t filters, taps, silu;
} StormConv;

typedef struct {
  StormReduction reduction;
  StormTensor x, out;
  int64_t batch, channels, threads;
} StormReduce;
