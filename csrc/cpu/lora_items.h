// What one call of the LoRA kernels works on, and the work items it is cut into. Plain data: shared by the drivers and every ISA's kernels.
#pragma once

#include "../common/element.h"

#include <cstdint>

// Clang has no `#pragma GCC target`; there, and on other processors, the generic kernels are all there is.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MTK_X86_KERNELS 1
#if __GNUC__ >= 10
#define MTK_BF16_KERNELS 1
#endif
#endif

namespace mtk {
struct DropoutKey;
}

namespace mtk::cpu {

struct RowMatrix {
  void* data;
  int64_t stride;
};

struct Factor {
  void* data;  // null: absent, or a gradient nobody wants
  int64_t row_stride, col_stride;
};

// The positions of one adapter in sorted order; position p lies in row p / slots.
struct LoraGroup {
  const int32_t* positions;
  int64_t n;
};

// One adapter of one target.
struct LoraAdapter {
  int64_t rank;
  Factor A, B;       // [rank, D] with unit column stride, [O, rank] with any
  const void* bias;  // [O] or null
  float scale;
  float keep_factor;   // 65536 / (65536 - threshold); 1 without dropout
  uint32_t threshold;  // 0: no dropout
  uint64_t seed;
  Factor dA, dB;
  void* dbias;
  float *partial_A, *partial_B;  // [row groups, rank, D] and [row groups, ranks(), O] when the adapter has several row groups
  float* d;                      // [planes, n, d_stride(rank)]: dy B over one plane's columns of dy, as dot_block leaves it
  bool needs_d;

  int64_t ranks() const { return rank + (bias != nullptr); }  // the bias rides along as one more rank whose S is 1
};

struct LoraTarget {
  const LoraAdapter* adapters;
  int64_t O;
  RowMatrix y;            // or dy
  int64_t s_col, s_cols;  // its columns of s and ds
  uint32_t site;
  float* e;                    // [positions], or null
  int64_t planes, plane_cols;  // of dy, for d
};

struct LoraCall {
  int64_t D, slots, n_groups, n_targets;
  const LoraGroup* groups;
  const LoraTarget* targets;
  Element x_type, y_type, factor_type, grad_type, s_type, ds_type;  // dx has the type of x, dy that of y
  RowMatrix x, dx, s, ds;                                           // dx.data may be null
  const float* gates;                                               // [positions], or null
  uint32_t step;
  // Keep bits [positions, n_targets, bits_cols]: the forward fills them, the backward reads them in place of drawing the mask; or null.
  uint8_t* filled_bits;
  const uint8_t* stored_bits;
  int64_t bits_cols;
};

// Positions [row0, row1) of one adapter, counted from its first, against columns [col0, col1) of one target, or of all targets' x.
struct LoraItem {
  int64_t group, target;
  int64_t row0, row1, col0, col1;
  int64_t row_group;
};

// Rows of a forward item at most: its rank-space data stays in cache.
constexpr int64_t kForwardRows = 256;
// Rows whose gradient is summed in one go: fixed, because it fixes the order of the sum.
constexpr int64_t kGroupRows = 1024;
// Columns that items and planes of d are aligned to.
constexpr int64_t kItemCols = 256;

// y = bias + sum over parts of x w, x [M, K] and w(k, n) at w[k * k_stride + n * n_stride].
struct BasePart {
  const void *x, *w;
  int64_t x_stride, k_stride, n_stride, K;
};

struct BaseCall {
  Element type, y_type;
  int64_t M, N, n_parts;
  const BasePart* parts;
  const void* bias;  // [N] or null
  void* y;           // columns from y_col on
  int64_t y_stride, y_col;
  const int32_t *x_rows, *y_rows;  // of the M rows; null: in order
  // For the experts of a MoE; null: neither. dots[col0 / kBaseCols][y row] = y . z[z row] over a tile's columns, then y *= gates[y row].
  const void* z;
  int64_t z_stride;
  const int32_t* z_rows;
  float* dots;
  int64_t dots_stride;
  const float* gates;
};

constexpr int64_t kBaseRows = 720;
constexpr int64_t kBaseCols = 256;

struct BaseKernels {
  // Floats of scratch a tile needs.
  int64_t (*scratch)();
  // Rows [row0, row1), at most kBaseRows, of columns [col0, col1), at most kBaseCols.
  void (*tile)(const BaseCall&, int64_t row0, int64_t row1, int64_t col0, int64_t col1, float* scratch);
};

using LoraKernel = void (*)(const LoraCall&, const LoraItem&, float* scratch);

struct LoraKernels {
  // Floats of one row of d.
  int64_t (*d_stride)(int64_t rank);
  // Floats of scratch any item needs; ranks: the largest sum over targets of an adapter's ranks().
  int64_t (*scratch)(int64_t ranks, int64_t targets);
  LoraKernel shrink, expand;
  // d and the gradients of B and bias; then ds and e; then the gradients of A and x.
  LoraKernel backward_y, finish_d, backward_x;
  // Sum an adapter's partial gradients over its row groups.
  LoraKernel reduce_A, reduce_B;
  BaseKernels base;
  // Keep bits of a row's n_cols columns, zeros to the end of the last byte.
  void (*keep_row)(const DropoutKey&, uint32_t threshold, int64_t n_cols, uint8_t* bits);
  // out[n] = sum of n floats at z, z + stride, ..., in this order.
  void (*sum_rows)(const float* z, int64_t stride, int64_t count, int64_t n, Element type, void* out);
};

extern const LoraKernels lora_generic;
extern const LoraKernels lora_avx2;
extern const LoraKernels lora_avx512;
// For bfloat16, on CPUs with its dot product.
extern const BaseKernels base_avx512bf16;

}  // namespace mtk::cpu
