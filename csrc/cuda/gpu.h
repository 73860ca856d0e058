// The one header kernels include. Under nvcc it is CUDA; under g++ -DGPU_EMU the same names come from the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common/element.h"
#include "../common/philox.h"

#ifdef GPU_EMU
#include "../emulator/gpu_emulated.h"
#else

#define GPU_DEVICE __device__ __forceinline__

#include "gpu_ptx.h"

// Names a host function that lab.CudaEmulator may call; nothing for nvcc.
#define GPU_ENTRY(function) static_assert(true)

// Shared memory goes through these two, so that the emulator can guard it: GPU_SHARED(float, part, [8]);
#define GPU_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define DYN_SMEM(T, name)                                               \
  extern __shared__ __align__(128) unsigned char gpu_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(gpu_dynamic_shared)

namespace gpu {

// nullptr, or what went wrong. An empty grid is no launch.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (smem > 48 * 1024) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, static_cast<int>(smem));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(args)...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gpu

#endif

namespace gpu {

GPU_DEVICE float to_float(float x) { return x; }
GPU_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
GPU_DEVICE float to_float(__half x) { return __half2float(x); }

GPU_DEVICE void store(float* p, float x) { *p = x; }
GPU_DEVICE void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
GPU_DEVICE void store(__half* p, float x) { *p = __float2half_rn(x); }

// Every lane gets the sum of the warp's values, added in one fixed order.
template <class T>
GPU_DEVICE T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

}  // namespace gpu
