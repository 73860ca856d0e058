// cp.async, ldmatrix and mma.sync: host twins of the PTX wrappers in gpu.h.
#pragma once

#include "runtime.h"

namespace gpu {

GPU_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) { emu::cp_async(shared, global, 16, valid); }
GPU_DEVICE void cp_async_commit() { emu::cp_async_commit(); }
template <int Pending>
GPU_DEVICE void cp_async_wait() { emu::cp_async_wait(Pending); }

GPU_DEVICE void ldmatrix_x4(unsigned (&r)[4], const void* row) { emu::ldmatrix(r, row, 4, false); }
GPU_DEVICE void ldmatrix_x2(unsigned (&r)[2], const void* row) { emu::ldmatrix(r, row, 2, false); }
GPU_DEVICE void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) { emu::ldmatrix(r, row, 4, true); }
GPU_DEVICE void ldmatrix_x2_trans(unsigned (&r)[2], const void* row) { emu::ldmatrix(r, row, 2, true); }

GPU_DEVICE void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emu::mma_m16n8k16(d, a, b, true);
}
GPU_DEVICE void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emu::mma_m16n8k16(d, a, b, false);
}

}  // namespace gpu
