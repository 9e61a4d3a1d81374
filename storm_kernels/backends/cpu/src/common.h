// What does not depend on the instruction set: sequences, where tokens go, workspaces.
#pragma once
#include <stddef.h>

#include "api.h"

// One sequence: `length` tokens of a batch entry from token `start` on.
struct StormSequence {
  int64_t batch, start, length;
  int64_t first_checkpoint;  // row of its first checkpoint
};

// Where tokens go under a reduction.
struct StormTokenMap {
  int64_t *cell, *kept;   // of each token: its cell and its index among the kept ones; -1, -1 if it is dropped
  float* count;           // of each cell: the tokens that it averages
  int64_t tokens, cells;  // how many there are
};

int64_t storm_sequence_count(const StormShape& shape);
StormSequence storm_sequence(const StormShape& shape, int64_t index);
bool storm_build_token_map(const StormReduction& r, StormTokenMap* map);
void storm_free_token_map(StormTokenMap* map);

// The name of the first buffer that is absent or too small for what the call reads and writes there
// (fits.cpp); null if all fit.
const char* storm_refused_by_scan(const StormScan& a);
const char* storm_refused_by_scan_backward(const StormScan& a, const StormScanGrads& grads);
const char* storm_refused_by_conv(const StormConv& a);
const char* storm_refused_by_reduce(const StormReduce& a);

// Memory that nobody has written yet, to be freed with free(); a large piece on huge pages
// (backends/pages.py). Null if there is none.
void* storm_fresh(size_t bytes);

// This thread's workspace, 64-byte aligned, kept for the next call; null if there is no memory.
char* storm_workspace(size_t bytes);
// Called by each thread at the end of a call: hands back a workspace above the bound.
void storm_trim_workspace();
