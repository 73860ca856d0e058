// ldmatrix and mma.sync.m16n8k16 with the fragment layouts of the PTX manual.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "state.h"

namespace emu {
namespace {

struct Fragments {
  unsigned a[4], b[2];
};

double element(unsigned pair, int half, bool bf16) {
  const unsigned short bits = static_cast<unsigned short>(half ? pair >> 16 : pair & 0xffff);
  if (bf16) return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
  return __half2float(__half(__half_raw{bits}));
}

}  // namespace

void ldmatrix(unsigned* out, const void* row, int matrices, bool transposed) {
  const void* pc = __builtin_return_address(0);
  const int lane = running->context.lane;
  if (lane < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16) 
      fail(make_finding("misaligned-access", {pc}, "a row of ldmatrix is not aligned to 16 bytes"));
    if (place_of(row).space != Space::shared) 
      fail(make_finding("out-of-bounds", {pc}, "a row of ldmatrix is not in this block's shared memory"));
    show_read(row, 16, pc);
  }
  const Lanes& lanes = meet(~0u, WarpOp::ldmatrix, &row, sizeof row, pc);
  const auto at = [&](int matrix, int r, int c) -> unsigned {
    return lanes.get<const uint16_t*>(8 * matrix + r)[c];
  };
  for (int m = 0; m < matrices; m++) {
    const int r = lane / 4, c = lane % 4 * 2;
    out[m] = transposed ? at(m, c, r) | at(m, c + 1, r) << 16 : at(m, r, c) | at(m, r, c + 1) << 16;
  }
}

// Products are exact; their sum is rounded once. The hardware's order and truncation are not documented.
void mma_m16n8k16(float* d, const unsigned* a, const unsigned* b, bool bf16) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const Lanes& lanes = meet(~0u, WarpOp::mma, &mine, sizeof mine, __builtin_return_address(0));
  const int lane = running->context.lane;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2, low_or_high = i / 2;
    double sum = d[i];
    for (int k = 0; k < 16; k++) {
      const int quarter = k % 8 / 2;
      const unsigned a_pair = lanes.get<Fragments>(4 * row + quarter).a[low_or_high + k / 8 * 2];
      const unsigned b_pair = lanes.get<Fragments>(4 * column + quarter).b[k / 8];
      sum += element(a_pair, k % 2, bf16) * element(b_pair, k % 2, bf16);
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace emu
