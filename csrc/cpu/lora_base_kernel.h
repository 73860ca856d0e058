// The shared frozen layer: one tile of its output, or of its dx, in a fixed order.
#pragma once

#include "lora_blocks.h"

namespace mtk::cpu::MTK_ISA {

static int64_t base_scratch() { return kBlockFloats + kBlock * kBaseCols + kBaseRows * kBaseCols + 256; }

// y[row0..row1][col0..col1]: panels widened to fp32 in cache, one rounding at the end.
static void base(const BaseCall& call, int64_t row0, int64_t row1, int64_t col0, int64_t col1, float* scratch) {
  Arena arena{scratch};
  float* block = Arena::take(&arena, kBlockFloats);
  float* panel = Arena::take(&arena, kBlock * kBaseCols);
  float* acc = Arena::take(&arena, kBaseRows * kBaseCols);
  const int64_t n = col1 - col0, acc_stride = round_up(n, kWidth);
  fill_zero(acc, (row1 - row0) * acc_stride);
  int32_t rows[kRows];
  for (int32_t i = 0; i < kRows; ++i) rows[i] = i;
  for (const BasePart* part = call.parts; part < call.parts + call.n_parts; ++part)
    for (int64_t q = 0; q < part->K; q += kBlock) {
      const int64_t k = least(kBlock, part->K - q);
      MTK_WITH_TYPE(call.type, T, {
        pack_dot_panel(at<T>(part->w, q * part->k_stride + col0 * part->n_stride), part->k_stride, part->n_stride, k, n, panel);
        for (int64_t i = row0; i < row1; i += kRows) {
          const int64_t m = least(kRows, row1 - i);
          pack_rows(at<T>(part->x, i * part->x_stride), part->x_stride, rows, m, q, k, block, nullptr, 0);
          dot_block(block, m, k, panel, n, acc + (i - row0) * acc_stride, acc_stride);
        }
      });
    }
  MTK_WITH_TYPE(call.type, T, {
    for (int64_t i = row0; i < row1; ++i) {
      float line[kBaseCols];
      dot_finish(acc + (i - row0) * acc_stride, n, 1.f, line);
      for (int64_t j = 0; call.bias && j < n; j += kWidth) {
        const int count = static_cast<int>(least(kWidth, n - j));
        vstore(line + j, vadd(vload(line + j, count), vload(at<T>(call.bias, col0 + j), count)), count);
      }
      copy_out(line, n, 1.f, static_cast<T*>(call.y) + i * call.N + col0);
    }
  });
}

}  // namespace mtk::cpu::MTK_ISA
