// Kernels that are right: the emulator must find nothing in them. nvcc compiles the same file.
#include "gpu.h"

namespace {

template <int kThreads>
GPU_DEVICE int block_exclusive_scan(int x, int* total) {
  GPU_SHARED(int, warp_sums, [32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = x;
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += below;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    int sum = lane < kThreads / 32 ? warp_sums[lane] : 0;
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += below;
    }
    warp_sums[lane] = sum;
  }
  __syncthreads();
  *total = warp_sums[kThreads / 32 - 1];
  return inclusive - x + (warp ? warp_sums[warp - 1] : 0);
}

// Stable counting sort of tokens by expert, one block.
template <int kExperts, int kThreads>
__global__ void __launch_bounds__(kThreads) route(const int* expert, int n, int* offsets, int* perm) {
  GPU_SHARED(int, counts, [kExperts]);
  GPU_SHARED(int, next, [kExperts]);
  const int t = threadIdx.x;
  for (int e = t; e < kExperts; e += kThreads) counts[e] = 0;
  __syncthreads();
  for (int i = t; i < n; i += kThreads) atomicAdd(&counts[expert[i]], 1);
  __syncthreads();
  int total;
  const int begin = block_exclusive_scan<kThreads>(t < kExperts ? counts[t] : 0, &total);
  if (t < kExperts) offsets[t] = next[t] = begin;
  if (t == 0) offsets[kExperts] = total;
  __syncthreads();
  if (t >= 32) return;
  for (int first = 0; first < n; first += 32) {
    const int i = first + t, e = i < n ? expert[i] : -1;
    const unsigned same = __match_any_sync(~0u, e);
    const int rank = __popc(same & ((1u << t) - 1));
    if (e >= 0) perm[next[e] + rank] = i;
    __syncwarp();
    if (e >= 0 && rank == 0) next[e] += __popc(same);
    __syncwarp();
  }
}

// Every block leaves a partial sum; the block that counts last adds them in order.
template <bool kFences>
__global__ void __launch_bounds__(64) sum_last_block(const float* x, int n, float* partial, int* counter, float* sum) {
  GPU_SHARED(float, warp_sums, [2]);
  GPU_SHARED(bool, last, );
  const int t = threadIdx.x;
  float s = 0.0f;
  for (int i = blockIdx.x * 64 + t; i < n; i += gridDim.x * 64) s += x[i];
  s = gpu::warp_sum(s);
  if (t % 32 == 0) warp_sums[t / 32] = s;
  __syncthreads();
  if (t == 0) {
    partial[blockIdx.x] = warp_sums[0] + warp_sums[1];
    if (kFences) {
      __threadfence();
      last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
      __threadfence();
    } else {
      last = gpu::atomic_add_acq_rel(counter, 1) == static_cast<int>(gridDim.x) - 1;
    }
  }
  __syncthreads();
  if (!last || t != 0) return;
  float all = 0.0f;
  for (unsigned b = 0; b < gridDim.x; b++) all += partial[b];
  *sum = all;
}

// Prefix sum over blocks: each waits for the one before it, in the order of their tickets.
__global__ void __launch_bounds__(64) chained_scan(const int* x, int n, int* ticket, int* ready, int* prefix, int* out) {
  GPU_SHARED(int, chunk, );
  GPU_SHARED(int, before, );
  const int t = threadIdx.x;
  if (t == 0) chunk = gpu::atomic_add_acq_rel(ticket, 1);
  __syncthreads();
  const int i = chunk * 64 + t;
  int total;
  const int own = i < n ? x[i] : 0;
  const int exclusive = block_exclusive_scan<64>(own, &total);
  if (t == 0) {
    before = 0;
    if (chunk > 0) {
      while (gpu::ld_acquire(ready + chunk - 1) == 0) {
      }
      before = prefix[chunk - 1];
    }
    prefix[chunk] = before + total;
    gpu::st_release(ready + chunk, 1);
  }
  __syncthreads();
  if (i < n) out[i] = before + exclusive + own;
}

GPU_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16) { gpu::mma_bf16(d, a, b); }
GPU_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) { gpu::mma_f16(d, a, b); }

// C[M, N] = A[M, K] B[K, N]: two warps make a 16 x 16 tile of C from double-buffered tiles in shared memory.
template <class T>
__global__ void __launch_bounds__(64) matmul(const T* a, const T* b, float* c, int n, int k) {
  DYN_SMEM(T, tiles);
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int row0 = blockIdx.x * 16, column0 = blockIdx.y * 16;
  const auto fetch = [&](int stage, int k0) {
    // 16 rows of A, then 16 of B, two 16-byte pieces each
    const int row = t % 32 / 2, piece = t % 2 * 8;
    T* to = tiles + stage * 512 + warp * 256 + row * 16 + piece;
    const T* from = warp == 0 ? a + static_cast<int64_t>(row0 + row) * k + k0 + piece
                              : b + static_cast<int64_t>(k0 + row) * n + column0 + piece;
    gpu::cp_async16(to, from);
    gpu::cp_async_commit();
  };
  float d[4] = {};
  fetch(0, 0);
  for (int k0 = 0, stage = 0; k0 < k; k0 += 16, stage ^= 1) {
    if (k0 + 16 < k) {
      fetch(stage ^ 1, k0 + 16);
      gpu::cp_async_wait<1>();
    } else {
      gpu::cp_async_wait<0>();
    }
    __syncthreads();
    const T* tile = tiles + stage * 512;
    unsigned fa[4], fb[2];
    gpu::ldmatrix_x4(fa, tile + lane % 16 * 16 + lane / 16 * 8);
    gpu::ldmatrix_x2_trans(fb, tile + 256 + lane % 16 * 16 + warp * 8);
    mma(d, fa, fb, T{});
    __syncthreads();
  }
  for (int i = 0; i < 4; i++)
    c[static_cast<int64_t>(row0 + lane / 4 + i / 2 * 8) * n + column0 + warp * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// out[j, i] = x[i, j] through a 32 x 32 tile, padded or not
template <int kPad>
__global__ void __launch_bounds__(256) transpose(const float* x, int rows, int columns, float* out) {
  GPU_SHARED(float, tile, [32][32 + kPad]);
  const int c = threadIdx.x, c0 = blockIdx.x * 32, r0 = blockIdx.y * 32;
  for (int r = threadIdx.y; r < 32; r += 8)
    if (r0 + r < rows && c0 + c < columns) tile[r][c] = x[(r0 + r) * columns + c0 + c];
  __syncthreads();
  for (int r = threadIdx.y; r < 32; r += 8)
    if (c0 + r < columns && r0 + c < rows) out[(c0 + r) * rows + r0 + c] = tile[c][r];
}

// What each lane sees of warp functions: 8 results per lane.
__global__ void warp_functions(const int* x, unsigned* out) {
  const int lane = threadIdx.x;
  const unsigned mask = __ballot_sync(~0u, lane < 24);
  unsigned* mine = out + lane * 8;
  mine[0] = __shfl_sync(~0u, x[lane], 5, 8);
  mine[1] = __shfl_up_sync(~0u, x[lane], 3, 16);
  mine[2] = __shfl_down_sync(~0u, x[lane], 3, 16);
  mine[3] = __shfl_xor_sync(~0u, x[lane], 6);
  mine[4] = mask;
  mine[5] = __reduce_max_sync(~0u, x[lane]);
  mine[6] = __any_sync(~0u, x[lane] == 7) * 2 + __all_sync(~0u, x[lane] >= 0);
  mine[7] = __syncthreads_count(x[lane] > 3);
}

}  // namespace

const char* run_route(const int* expert, int n, int* offsets, int* perm) {
  return gpu::launch(route<32, 128>, 1, 128, 0, nullptr, expert, n, offsets, perm);
}
const char* run_sum_last_block(bool fences, const float* x, int n, float* partial, int n_blocks, int* counter, float* sum) {
  return gpu::launch(fences ? sum_last_block<true> : sum_last_block<false>, n_blocks, 64, 0, nullptr, x, n, partial, counter, sum);
}
const char* run_chained_scan(const int* x, int n, int* ticket, int* ready, int* prefix, int* out) {
  return gpu::launch(chained_scan, (n + 63) / 64, 64, 0, nullptr, x, n, ticket, ready, prefix, out);
}
const char* run_matmul_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k) {
  return gpu::launch(matmul<__nv_bfloat16>, dim3(m / 16, n / 16), 64, 2 * 512 * 2, nullptr, a, b, c, n, k);
}
const char* run_matmul_f16(const __half* a, const __half* b, float* c, int m, int n, int k) {
  return gpu::launch(matmul<__half>, dim3(m / 16, n / 16), 64, 2 * 512 * 2, nullptr, a, b, c, n, k);
}
const char* run_transpose(bool padded, const float* x, int rows, int columns, float* out) {
  const dim3 grid((columns + 31) / 32, (rows + 31) / 32), block(32, 8);
  return gpu::launch(padded ? transpose<1> : transpose<0>, grid, block, 0, nullptr, x, rows, columns, out);
}
const char* run_warp_functions(const int* x, unsigned* out) { return gpu::launch(warp_functions, 1, 32, 0, nullptr, x, out); }
const char* run_too_many_threads(float* x) {
  return gpu::launch(transpose<0>, 1, 2048, 0, nullptr, x, 1, 1, x);
}

GPU_ENTRY(run_route);
GPU_ENTRY(run_sum_last_block);
GPU_ENTRY(run_chained_scan);
GPU_ENTRY(run_matmul_bf16);
GPU_ENTRY(run_matmul_f16);
GPU_ENTRY(run_transpose);
GPU_ENTRY(run_warp_functions);
GPU_ENTRY(run_too_many_threads);
