// The g++ half of gpu.h: CUDA's names, on top of the emulator's runtime.
#pragma once

#include "entry.h"
#include "runtime.h"

#undef __shared__
#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#define __shared__ static_assert(false, "declare shared memory with GPU_SHARED or DYN_SMEM");
#define __global__
#define __device__
// Inlined always, so that a finding inside a helper also names the line that called it.
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define GPU_DEVICE inline __attribute__((always_inline))

#define threadIdx (emu::current->thread)
#define blockIdx (emu::current->block)
#define blockDim (emu::current->block_dim)
#define gridDim (emu::current->grid_dim)
#define warpSize 32

#define GPU_SHARED(T, name, ...)                                \
  using name##_shared_type = T __VA_ARGS__;                     \
  static const char name##_shared_key = 0;                      \
  name##_shared_type& name = *static_cast<name##_shared_type*>( \
      emu::static_shared(&name##_shared_key, sizeof(name##_shared_type)))
#define DYN_SMEM(T, name) T* name = static_cast<T*>(emu::dynamic_shared())

#include "atomics.h"
#include "device_math.h"
#include "tensor_ops.h"
#include "warp_ops.h"

namespace gpu {

template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* /*stream*/, A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  const auto body = [=] { kernel(static_cast<P>(args)...); };
  return emu::launch(grid, block, smem, [](const void* p) { (*static_cast<const decltype(body)*>(p))(); }, &body);
}

}  // namespace gpu
