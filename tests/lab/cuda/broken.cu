// Each kernel exists twice: right, and with the mistake that `// BUG` marks. The emulator must tell them apart.
#include "gpu.h"

namespace {

constexpr int kThreads = 64;

template <bool kBroken>
__global__ void mask_dropped(const float* x, int n, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (kBroken || i < n) out[i] = 2.0f * x[i];  // BUG
}

template <bool kBroken>
__global__ void barrier_removed(const float* x, float* out) {
  GPU_SHARED(float, row, [kThreads]);
  const int t = threadIdx.x;
  row[t] = x[blockIdx.x * kThreads + t];  // BUG
  if (!kBroken) __syncthreads();
  out[blockIdx.x * kThreads + t] = row[kThreads - 1 - t];  // BUG
}

template <bool kBroken>
__global__ void plain_add_for_atomic(const int* x, int* counts) {
  const int bin = x[blockIdx.x * kThreads + threadIdx.x];
  if (kBroken) counts[bin] += 1;  // BUG
  else atomicAdd(&counts[bin], 1);
}

template <bool kBroken>
__global__ void relaxed_counter(const float* x, float* partial, int* counter, float* out) {
  const float sum = gpu::warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = sum;  // BUG
  const int before = kBroken ? atomicAdd(counter, 1) : gpu::atomic_add_acq_rel(counter, 1);
  if (before != static_cast<int>(gridDim.x) - 1) return;
  float all = 0.0f;
  for (unsigned b = 0; b < gridDim.x; b++) all += partial[b];  // BUG
  *out = all;
}

template <bool kBroken>
__global__ void fence_removed(const float* x, float* partial, int* counter, float* out) {
  const float sum = gpu::warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = sum;  // BUG
  if (!kBroken) __threadfence();
  if (atomicAdd(counter, 1) != static_cast<int>(gridDim.x) - 1) return;
  __threadfence();
  float all = 0.0f;
  for (unsigned b = 0; b < gridDim.x; b++) all += partial[b];  // BUG
  *out = all;
}

template <bool kBroken>
__global__ void weak_wait(const float* x, float* out) {
  GPU_SHARED(float4, rows, [2][32]);
  const int t = threadIdx.x;
  for (int stage = 0; stage < 2; stage++) {
    gpu::cp_async16(&rows[stage][t], x + stage * 128 + t * 4);
    gpu::cp_async_commit();
  }
  gpu::cp_async_wait<kBroken ? 1 : 0>();
  out[t] = rows[0][t].x + rows[1][t].x;  // BUG
  gpu::cp_async_wait<0>();
}

template <bool kBroken>
__global__ void refilled_too_early(const float* x, float* out) {
  GPU_SHARED(float4, row, [kThreads]);
  const int t = threadIdx.x;
  for (int stage = 0; stage < 2; stage++) {
    gpu::cp_async16(&row[t], x + stage * 4 * kThreads + t * 4);  // BUG
    gpu::cp_async_commit();
    gpu::cp_async_wait<0>();
    __syncthreads();
    out[stage * kThreads + t] = row[kThreads - 1 - t].y;  // BUG
    if (!kBroken) __syncthreads();
  }
}

// out[row, column] = x[row, column] + 1, one block per row
template <bool kBroken>
__global__ void wrong_row_offset(const float* x, int columns, float* out) {
  const int column = threadIdx.x, row = blockIdx.x, stride = kBroken ? columns - 1 : columns;
  if (column < columns) out[row * stride + column] = x[row * columns + column] + 1.0f;  // BUG
}

// x holds rows first_row, first_row + 1, ... of a matrix with more than 2^31 elements
template <bool kBroken>
__global__ void index_overflow(const float* x, int first_row, int columns, float* out) {
  const int row = first_row + static_cast<int>(blockIdx.x), column = threadIdx.x;
  const int64_t origin = static_cast<int64_t>(first_row) * columns;
  const int64_t index = kBroken ? row * columns + column : static_cast<int64_t>(row) * columns + column;  // BUG
  out[blockIdx.x * kThreads + column] = x[index - origin];  // BUG
}

template <bool kBroken>
__global__ void output_unwritten(const float* x, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (!kBroken || x[i] > 0.0f) out[i] = x[i] > 0.0f ? x[i] : 0.0f;
}

template <bool kBroken>
__global__ void shared_unwritten(const float* x, float* out) {
  GPU_SHARED(float, row, [32]);
  const int t = threadIdx.x;
  if (!kBroken || t < 31) row[t] = x[t];
  __syncwarp();
  out[t] = row[31 - t];  // BUG
}

template <bool kBroken>
__global__ void misaligned_vector(const float* x, float* out) {
  const int t = threadIdx.x;
  const float4 v = *reinterpret_cast<const float4*>(x + 4 * t + (kBroken ? 1 : 0));  // BUG
  out[t] = v.x + v.y + v.z + v.w;
}

template <bool kBroken>
__global__ void order_of_addition(const float* x, float* partial, float* out) {
  const float sum = gpu::warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x != 0) return;
  if (kBroken) atomicAdd(out, sum);
  else partial[blockIdx.x] = sum;
}

template <bool kBroken>
__global__ void divergent_barrier(const float* x, float* out) {
  GPU_SHARED(float, row, [kThreads]);
  const int t = threadIdx.x;
  row[t] = x[t];
  if (kBroken && t < 32) {
    __syncthreads();  // BUG
    out[t] = row[t + 32];
    return;
  }
  if (!kBroken) __syncthreads();
  out[t] = row[(t + 32) % kThreads];
}

template <bool kBroken>
__global__ void two_barriers(const float* x, float* out) {
  GPU_SHARED(float, row, [kThreads]);
  const int t = threadIdx.x;
  row[t] = x[t];
  if (kBroken && t % 2) {
    __syncthreads();  // BUG
  } else {
    __syncthreads();  // BUG
  }
  out[t] = row[kThreads - 1 - t];
}

template <bool kBroken>
__global__ void exited_lane(const float* x, int n, float* out) {
  const int t = threadIdx.x;
  if (kBroken && t >= n) return;
  const float sum = gpu::warp_sum(t < n ? x[t] : 0.0f);  // BUG
  if (t == 0) *out = sum;
}

// Half of a warp's lanes wait for the other half at another operation.
template <bool kBroken>
__global__ void warp_divergence(const float* x, float* out) {
  const int t = threadIdx.x;
  float v = x[t];
  if (kBroken && t < 16) v += __ballot_sync(~0u, v > 0.0f);  // BUG
  else v += __shfl_sync(kBroken ? ~0u : __activemask(), v, 20);  // BUG
  out[t] = v;
}

// Lane 0 waits for lane 1, which waits with the others.
template <bool kBroken>
__global__ void lane_never_comes(float* out) {
  if (threadIdx.x < (kBroken ? 1 : 2)) __syncwarp(3u);  // BUG
  __syncthreads();  // BUG
  out[threadIdx.x] = 1.0f;
}

template <bool kBroken>
__global__ void never_waited(const float* x, float* out) {
  GPU_SHARED(float4, row, [32]);
  const int t = threadIdx.x;
  gpu::cp_async16(&row[t], x + 4 * t);  // BUG
  gpu::cp_async_commit();
  if (!kBroken) gpu::cp_async_wait<0>();
  out[t] = row[t].x;  // BUG
}

// Block 0 waits for a flag that block 1 raises; broken, no block does.
template <bool kBroken>
__global__ void flag_never_raised(int* flag, float* out) {
  if (blockIdx.x == 1 && !kBroken) gpu::st_release(flag, 1);
  if (blockIdx.x == 0) {
    while (gpu::ld_acquire(flag) == 0) {  // BUG
    }
    *out = 1.0f;
  }
}

template <bool kBroken>
__global__ void shared_overrun(const float* x, float* out) {
  GPU_SHARED(float, row, [32]);
  const int t = threadIdx.x;
  row[t + (kBroken ? 1 : 0)] = x[t];  // BUG
  __syncwarp();
  out[t] = row[t];
}

template <bool kBroken>
__global__ void wild_store(float* out) {
  out[threadIdx.x + (kBroken ? int64_t{1} << 40 : 0)] = 1.0f;  // BUG
}

template <bool kBroken>
__global__ void scattered_rows(const float* x, int columns, float* out) {
  const int t = threadIdx.x;
  out[t] = kBroken ? x[t * columns] : x[t];  // BUG
}

template <class... P, class... A>
const char* pick(bool broken, void (*wrong)(P...), void (*right)(P...), int blocks, int threads, A... args) {
  return gpu::launch(broken ? wrong : right, blocks, threads, 0, nullptr, args...);
}

}  // namespace

#define PICK(kernel, blocks, threads, ...) pick(broken, kernel<true>, kernel<false>, blocks, threads, __VA_ARGS__)

const char* run_mask_dropped(bool broken, const float* x, int n, float* out) { return PICK(mask_dropped, (n + 63) / 64, 64, x, n, out); }
const char* run_barrier_removed(bool broken, const float* x, float* out) { return PICK(barrier_removed, 2, 64, x, out); }
const char* run_plain_add_for_atomic(bool broken, const int* x, int* counts) { return PICK(plain_add_for_atomic, 2, 64, x, counts); }
const char* run_relaxed_counter(bool broken, const float* x, float* partial, int* counter, float* out) {
  return PICK(relaxed_counter, 4, 32, x, partial, counter, out);
}
const char* run_fence_removed(bool broken, const float* x, float* partial, int* counter, float* out) {
  return PICK(fence_removed, 4, 32, x, partial, counter, out);
}
const char* run_weak_wait(bool broken, const float* x, float* out) { return PICK(weak_wait, 1, 32, x, out); }
const char* run_refilled_too_early(bool broken, const float* x, float* out) { return PICK(refilled_too_early, 1, 64, x, out); }
const char* run_wrong_row_offset(bool broken, const float* x, int rows, int columns, float* out) {
  return PICK(wrong_row_offset, rows, 64, x, columns, out);
}
const char* run_index_overflow(bool broken, const float* x, int first_row, int columns, float* out) {
  return PICK(index_overflow, 2, 64, x, first_row, columns, out);
}
const char* run_output_unwritten(bool broken, const float* x, float* out) { return PICK(output_unwritten, 2, 64, x, out); }
const char* run_shared_unwritten(bool broken, const float* x, float* out) { return PICK(shared_unwritten, 1, 32, x, out); }
const char* run_misaligned_vector(bool broken, const float* x, float* out) { return PICK(misaligned_vector, 1, 32, x, out); }
const char* run_order_of_addition(bool broken, const float* x, float* partial, float* out) {
  return PICK(order_of_addition, 16, 32, x, partial, out);
}
const char* run_divergent_barrier(bool broken, const float* x, float* out) { return PICK(divergent_barrier, 1, 64, x, out); }
const char* run_two_barriers(bool broken, const float* x, float* out) { return PICK(two_barriers, 1, 64, x, out); }
const char* run_exited_lane(bool broken, const float* x, int n, float* out) { return PICK(exited_lane, 1, 32, x, n, out); }
const char* run_warp_divergence(bool broken, const float* x, float* out) { return PICK(warp_divergence, 1, 32, x, out); }
const char* run_flag_never_raised(bool broken, int* flag, float* out) { return PICK(flag_never_raised, 2, 1, flag, out); }
const char* run_lane_never_comes(bool broken, float* out) { return PICK(lane_never_comes, 1, 64, out); }
const char* run_never_waited(bool broken, const float* x, float* out) { return PICK(never_waited, 1, 32, x, out); }
const char* run_shared_overrun(bool broken, const float* x, float* out) { return PICK(shared_overrun, 1, 32, x, out); }
const char* run_wild_store(bool broken, float* out) { return PICK(wild_store, 1, 32, out); }
const char* run_scattered_rows(bool broken, const float* x, int columns, float* out) { return PICK(scattered_rows, 1, 32, x, columns, out); }

GPU_ENTRY(run_mask_dropped);
GPU_ENTRY(run_barrier_removed);
GPU_ENTRY(run_plain_add_for_atomic);
GPU_ENTRY(run_relaxed_counter);
GPU_ENTRY(run_fence_removed);
GPU_ENTRY(run_weak_wait);
GPU_ENTRY(run_refilled_too_early);
GPU_ENTRY(run_wrong_row_offset);
GPU_ENTRY(run_index_overflow);
GPU_ENTRY(run_output_unwritten);
GPU_ENTRY(run_shared_unwritten);
GPU_ENTRY(run_misaligned_vector);
GPU_ENTRY(run_order_of_addition);
GPU_ENTRY(run_divergent_barrier);
GPU_ENTRY(run_two_barriers);
GPU_ENTRY(run_exited_lane);
GPU_ENTRY(run_warp_divergence);
GPU_ENTRY(run_flag_never_raised);
GPU_ENTRY(run_lane_never_comes);
GPU_ENTRY(run_never_waited);
GPU_ENTRY(run_shared_overrun);
GPU_ENTRY(run_wild_store);
GPU_ENTRY(run_scattered_rows);
