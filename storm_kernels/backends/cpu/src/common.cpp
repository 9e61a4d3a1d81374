#include "common.h"

#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t LARGE = size_t(4) << 20;           // as LEAST_BYTES of pages.py
constexpr size_t LARGEST_IDLE = size_t(32) << 20;    // bytes of a workspace between calls

struct Workspace {
  char* data = nullptr;
  size_t size = 0;
  ~Workspace() { free(data); }
};
thread_local Workspace workspace;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void* storm_fresh(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes ? bytes : 1)) return nullptr;
#ifdef MADV_HUGEPAGE
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  const uintptr_t first = ((uintptr_t)data + page - 1) / page * page, end = (uintptr_t)data + bytes;
  if (bytes >= LARGE) madvise((void*)first, (end - first) / page * page, MADV_HUGEPAGE);
#endif
  return data;
}

char* storm_workspace(size_t bytes) {
  if (workspace.size < bytes) {
    free(workspace.data);
    workspace.data = nullptr;
    workspace.size = 0;
    workspace.data = (char*)storm_fresh(bytes);
    workspace.size = workspace.data ? bytes : 0;
  }
  return workspace.data;
}

void storm_trim_workspace() {
  if (workspace.size <= LARGEST_IDLE) return;
  free(workspace.data);
  workspace.data = nullptr;
  workspace.size = 0;
}

int64_t storm_sequence_count(const StormShape& shape) { return shape.cu_seqlens ? shape.sequences : shape.batch; }

StormSequence storm_sequence(const StormShape& shape, int64_t index) {
  if (!shape.cu_seqlens) return {index, 0, shape.length, index * ceil_div(shape.length, STORM_INTERVAL)};
  int64_t start = shape.cu_seqlens[index];
  return {0, start, shape.cu_seqlens[index + 1] - start, start / STORM_INTERVAL + index};
}

bool storm_build_token_map(const StormReduction& r, StormTokenMap* map) {
  int64_t k = r.temporal_pool, p = r.spatial_pool, stride = r.temporal_stride;
  int64_t rows = ceil_div(r.height, p), columns = ceil_div(r.width, p),
          frames = ceil_div(ceil_div(r.frames, k), stride);
  map->tokens = r.frames * r.height * r.width;
  map->cells = frames * rows * columns;
  map->cell = (int64_t*)malloc(map->tokens * sizeof(int64_t));
  map->kept = (int64_t*)malloc(map->tokens * sizeof(int64_t));
  map->count = (float*)calloc(map->cells, sizeof(float));
  if (!map->cell || !map->kept || !map->count) {
    storm_free_token_map(map);
    return false;
  }
  int64_t token = 0, kept_tokens = 0;
  for (int64_t t = 0; t < r.frames; t++) {
    bool kept = t / k % stride == 0;
    for (int64_t i = 0; i < r.height; i++) {
      int64_t first = (t / k / stride * rows + i / p) * columns;
      for (int64_t j = 0; j < r.width; j++, token++) {
        map->cell[token] = kept ? first + j / p : -1;
        map->kept[token] = kept ? kept_tokens++ : -1;
        if (kept) map->count[first + j / p] += 1.0f;
      }
    }
  }
  return true;
}

void storm_free_token_map(StormTokenMap* map) {
  free(map->cell);
  free(map->kept);
  free(map->count);
  *map = {};
}

EXPORT int storm_checkpoint_interval(void) { return STORM_INTERVAL; }

// The size of each structure of api.h, in the order in which structs.py lists them; 0 after the last.
EXPORT int64_t storm_structure_bytes(int number) {
  static const int64_t bytes[] = {
      sizeof(StormTensor), sizeof(StormFloats),         sizeof(StormReduction), sizeof(StormShape),
      sizeof(StormDirection), sizeof(StormScan),        sizeof(StormDirectionGrads), sizeof(StormScanGrads),
      sizeof(StormFilter), sizeof(StormConv),           sizeof(StormReduce)};
  return number < (int)(sizeof bytes / sizeof bytes[0]) ? bytes[number] : 0;
}

// Best first; a variant that the compiler could not build is absent from the library, which
// `loader.py` sees.
EXPORT int storm_cpu_supports_avx512(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return 0;
#endif
}

EXPORT int storm_cpu_supports_avx2(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 0;
#endif
}

EXPORT int storm_cpu_supports_generic(void) { return 1; }
