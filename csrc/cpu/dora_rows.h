// What the DoRA driver asks of blocks and rows, per element type; each instruction set fills a table.
#pragma once

#include "../common/philox.h"

#include <cstdint>

namespace mtk::cpu {

// A block of the norm: rows of W padded with zeros to whole tiles, columns to whole vectors.
constexpr int64_t kNormRows = 48, kNormCols = 256;

struct DoraBlocks {
  int64_t width;  // floats per row of sums
  // sums[row][width] += (w + scale b^T a)^2, w [kNormRows][kNormCols], b [rank][kNormRows], a [rank][kNormCols], all fp32
  void (*add_squares)(const float* w, const float* b, const float* a, int64_t rank, int64_t rows, int64_t cols, float scale, float* sums);
  // norm[row] = sqrt of the row of sums, added in order
  void (*finish)(const float* sums, int64_t rows, float* norm);
};

// A row of n elements; `scale` null is 1, `base` null is 0.
struct DoraRows {
  void (*widen)(const void* x, int64_t n, float* y);
  void (*rescale)(const void* z, const float* scale, const void* base, int64_t n, void* y);
  // dz = scale dy; with z, sum (+)= dy z
  void (*gradient)(const void* dy, const void* z, const float* scale, int64_t n, bool add, void* dz, float* sum);
  void (*drop)(const void* x, int64_t n, const DropoutKey& key, uint32_t threshold, float factor, void* y);
};

extern const DoraBlocks dora_blocks_generic, dora_blocks_avx2, dora_blocks_avx512;
// float32, bfloat16, float16
extern const DoraRows dora_rows_generic[3], dora_rows_avx2[3], dora_rows_avx512[3];

}  // namespace mtk::cpu
