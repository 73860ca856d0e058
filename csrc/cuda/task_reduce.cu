#include "gpu.h"

namespace {

constexpr int kChunkRows = 1024;
constexpr int kThreads = 256;

// The group that owns row block `tile`: tiles[g] <= tile < tiles[g + 1].
GPU_DEVICE int group_of_tile(const int* tiles, int n_groups, int tile) {
  int low = 0, high = n_groups - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (tiles[middle] <= tile) low = middle;
    else high = middle - 1;
  }
  return low;
}

// One block per chunk of one task: chunks start at the task's own first row, so other tasks move no boundary.
template <class T>
__global__ void __launch_bounds__(kThreads)
sum_chunks(const T* values, const float* coef, const int* offsets, const int* perm, const int* tiles, int n_rows,
           int n_tasks, float* partial) {
  const int tile = static_cast<int>(blockIdx.x);
  if (tile >= tiles[n_tasks]) return;
  const int task = group_of_tile(tiles, n_tasks, tile);
  const int64_t begin = offsets[task] + static_cast<int64_t>(tile - tiles[task]) * kChunkRows;
  const int64_t end = min(min(begin + kChunkRows, static_cast<int64_t>(offsets[task + 1])), static_cast<int64_t>(n_rows));

  float sum = 0.0f;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int t = i < 0 ? -1 : perm[i];
    if (static_cast<unsigned>(t) < static_cast<unsigned>(n_rows)) {
      const float value = gpu::to_float(values[t]);
      sum += coef ? coef[t] * value : value;
    }
  }

  GPU_SHARED(float, warp_sums, [kThreads / 32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sum = gpu::warp_sum(sum);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = gpu::warp_sum(lane < kThreads / 32 ? warp_sums[lane] : 0.0f);
    if (lane == 0) partial[tile] = sum;
  }
}

// One warp per task adds the task's chunks in fp64, lane by lane, then across lanes.
__global__ void __launch_bounds__(32)
sum_tasks(const float* partial, const int* tiles, int n_partial, float* sums) {
  const int task = static_cast<int>(blockIdx.x);
  const int begin = max(tiles[task], 0), end = min(tiles[task + 1], n_partial);
  double sum = 0.0;
  for (int c = begin + static_cast<int>(threadIdx.x); c < end; c += 32) sum += partial[c];
  sum = gpu::warp_sum(sum);
  if (threadIdx.x == 0) sums[task] = static_cast<float>(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
scatter_rows(const float* dsums, const T* values, const float* coef, const int* ids, int n_rows, int n_tasks,
             T* dvalues, float* dcoef) {
  const int64_t t = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (t >= n_rows) return;
  const bool grouped = static_cast<unsigned>(ids[t]) < static_cast<unsigned>(n_tasks);
  const float dsum = grouped ? dsums[ids[t]] : 0.0f;
  gpu::store(dvalues + t, grouped && coef ? dsum * coef[t] : dsum);
  if (coef) dcoef[t] = grouped ? dsum * gpu::to_float(values[t]) : 0.0f;
}

template <class T>
const char* run_fwd(const void* values, const float* coef, const int* offsets, const int* perm, const int* tiles,
                    int n_rows, int n_tasks, float* partial, int n_partial, float* sums, void* stream) {
  if (n_tasks == 0) return nullptr;
  const char* error = gpu::launch(sum_chunks<T>, n_partial, kThreads, 0, stream, static_cast<const T*>(values), coef,
                                  offsets, perm, tiles, n_rows, n_tasks, partial);
  if (error) return error;
  return gpu::launch(sum_tasks, n_tasks, 32, 0, stream, partial, tiles, n_partial, sums);
}

template <class T>
const char* run_bwd(const float* dsums, const void* values, const float* coef, const int* ids, int n_rows, int n_tasks,
                    void* dvalues, float* dcoef, void* stream) {
  const unsigned blocks = (static_cast<unsigned>(n_rows) + kThreads - 1) / kThreads;
  return gpu::launch(scatter_rows<T>, blocks, kThreads, 0, stream, dsums, static_cast<const T*>(values), coef, ids,
                     n_rows, n_tasks, static_cast<T*>(dvalues), dcoef);
}

}  // namespace

namespace mtk::cuda {

// tiles: the row of group_plan's table for 1024 rows; n_partial: ceil(n_rows / 1024) + n_tasks.
const char* launch_task_reduce_fwd(Element element, const void* values, const float* coef, const int* offsets,
                                   const int* perm, const int* tiles, int n_rows, int n_tasks, float* partial,
                                   int n_partial, float* sums, void* stream) {
  const auto run = element == Element::f32    ? run_fwd<float>
                   : element == Element::bf16 ? run_fwd<__nv_bfloat16>
                                                  : run_fwd<__half>;
  return run(values, coef, offsets, perm, tiles, n_rows, n_tasks, partial, n_partial, sums, stream);
}

const char* launch_task_reduce_bwd(Element element, const float* dsums, const void* values, const float* coef,
                                   const int* ids, int n_rows, int n_tasks, void* dvalues, float* dcoef,
                                   void* stream) {
  const auto run = element == Element::f32    ? run_bwd<float>
                   : element == Element::bf16 ? run_bwd<__nv_bfloat16>
                                                  : run_bwd<__half>;
  return run(dsums, values, coef, ids, n_rows, n_tasks, dvalues, dcoef, stream);
}

}  // namespace mtk::cuda
