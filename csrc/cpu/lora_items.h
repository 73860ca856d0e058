// What one call of the LoRA kernels works on, and the work items it is cut into. Plain data: shared by the driver and every ISA's kernels.
#pragma once

#include "../common/element.h"

#include <cstdint>

// Clang has no `#pragma GCC target`; there, and on other processors, the generic kernels are all there is.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MTK_X86_KERNELS 1
#endif

namespace mtk::cpu {

struct RowMatrix {
  void* data;
  int64_t stride;
};

struct LoraAdapter {
  const void *A, *B, *bias;  // [rank, D], [O, rank], [O] or null
  int64_t rank;
  float scale;
  float keep_factor;   // 65536 / (65536 - threshold); 1 without dropout
  uint32_t threshold;  // 0: no dropout
  uint64_t seed;
  int64_t first_row;  // position of its first row in sorted order
  int64_t n_rows;
  const int32_t* rows;  // rows[n_rows] of x and y
  void *dA, *dB, *dbias;
  float *partial_A, *partial_B;  // [groups, rank, D] and [groups, ranks(), O] when the adapter has several row groups
  float* dS;                     // [planes, n_rows, lanes]: sums over one plane's columns of dy, as dot_block leaves them

  int64_t ranks() const { return rank + (bias != nullptr); }  // the bias rides along as one more rank whose S is 1
};

struct LoraCall {
  int64_t D, O;
  Element x_type, factor_type, s_type;
  RowMatrix x, y, dy, dx, s;  // dx.data may be null
  int64_t s_cols;
  uint32_t site, step;
  bool need_factors;
  int64_t plane_cols, planes;  // of dy, for dS
};

// Rows [row0, row1) of one adapter, counted from its first, against columns [col0, col1).
struct LoraItem {
  const LoraAdapter* adapter;
  int64_t row0, row1, col0, col1;
  int64_t group;
};

// Rows of a forward item at most: its rank-space data stays in cache.
constexpr int64_t kForwardRows = 256;
// Rows whose gradient is summed in one go: fixed, because it fixes the order of the sum.
constexpr int64_t kGroupRows = 1024;
// Columns that items and planes of dS are aligned to.
constexpr int64_t kItemCols = 256;

struct BaseCall {
  Element type;
  const void *x, *w, *bias;  // [M, K], w(k, n) at w[k * k_stride + n * n_stride], [N] or null
  int64_t x_stride, k_stride, n_stride;
  int64_t M, K, N;
  void* y;  // [M, N]
};

constexpr int64_t kBaseRows = 360;
constexpr int64_t kBaseCols = 256;

struct LoraKernels {
  int64_t lanes;  // a rank takes this many floats of dS, rounded up
  // Floats of scratch any item needs.
  int64_t (*scratch)(int64_t rank, int64_t rows);
  void (*forward)(const LoraCall&, const LoraItem&, float* scratch);
  void (*backward_dy)(const LoraCall&, const LoraItem&, float* scratch);
  void (*backward_x)(const LoraCall&, const LoraItem&, float* scratch);
  // Sum an adapter's partial gradients over its row groups.
  void (*reduce_A)(const LoraCall&, const LoraItem&, float* scratch);
  void (*reduce_B)(const LoraCall&, const LoraItem&, float* scratch);
  int64_t (*base_scratch)();
  void (*base)(const BaseCall&, int64_t row0, int64_t row1, int64_t col0, int64_t col1, float* scratch);
};

extern const LoraKernels lora_generic;
extern const LoraKernels lora_avx2;
extern const LoraKernels lora_avx512;

}  // namespace mtk::cpu
