// The frozen layer, shared or of one expert: one tile of its output, or of its dx, in a fixed order.
#pragma once

#include "lora_blocks.h"

namespace mtk::cpu::MTK_ISA {

static int64_t base_scratch() { return kBlockFloats + kBlock * kBaseCols + kBaseRows * kBaseCols + 256; }

// a . b in lanes, added up in order.
template <class T>
MTK_INLINE float line_dot(const float* a, const T* b, int64_t n) {
  vf sum = vzero();
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) sum = vfma(vload(a + j), vload(b + j), sum);
  if (j < n) sum = vfma(vload(a + j, static_cast<int>(n - j)), vload(b + j, static_cast<int>(n - j)), sum);
  float lanes[kWidth], total = 0.f;
  vstore(lanes, sum);
  for (int i = 0; i < kWidth; ++i) total += lanes[i];
  return total;
}

// The sums of a row, with the bias, dot and gate of the call, to y. Writes `line`.
static void finish_base(const BaseCall& call, int64_t i, float* line, int64_t col0, int64_t n) {
  const int64_t y_row = call.y_rows ? call.y_rows[i] : i;
  MTK_WITH_TYPE(call.type, T, {
    for (int64_t j = 0; call.bias && j < n; j += kWidth) {
      const int count = static_cast<int>(least(kWidth, n - j));
      vstore(line + j, vadd(vload(line + j, count), vload(at<T>(call.bias, col0 + j), count)), count);
    }
    if (call.dots)
      call.dots[col0 / kBaseCols * call.dots_stride + y_row] = line_dot(line, at<T>(call.z, call.z_rows[i] * call.z_stride + col0), n);
  });
  const float gate = call.gates ? call.gates[y_row] : 1.f;
  MTK_WITH_TYPE(call.y_type, T, copy_out(line, n, gate, static_cast<T*>(call.y) + y_row * call.y_stride + col0 - call.y_col));
}

// y[row0..row1][col0..col1]: panels widened to fp32 in cache, one rounding at the end.
static void base_tile(const BaseCall& call, int64_t row0, int64_t row1, int64_t col0, int64_t col1, float* scratch) {
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
          const int32_t* from = call.x_rows ? call.x_rows + i : rows;
          pack_rows(at<T>(part->x, call.x_rows ? 0 : i * part->x_stride), part->x_stride, from, m, q, k, block, nullptr, 0);
          dot_block(block, m, k, panel, n, acc + (i - row0) * acc_stride, acc_stride);
        }
      });
    }
  for (int64_t i = row0; i < row1; ++i) {
    float line[kBaseCols];
    dot_finish(acc + (i - row0) * acc_stride, n, 1.f, line);
    finish_base(call, i, line, col0, n);
  }
}

static void sum_rows(const float* z, int64_t stride, int64_t count, int64_t n, Element type, void* out) {
  MTK_WITH_TYPE(type, T, {
    int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth) {
      vf sum = vload(z + j);
      for (int64_t k = 1; k < count; ++k) sum = vadd(sum, vload(z + k * stride + j));
      vstore(static_cast<T*>(out) + j, sum);
    }
    if (j < n) {
      const int rest = static_cast<int>(n - j);
      vf sum = vload(z + j, rest);
      for (int64_t k = 1; k < count; ++k) sum = vadd(sum, vload(z + k * stride + j, rest));
      vstore(static_cast<T*>(out) + j, sum, rest);
    }
  });
}

}  // namespace mtk::cpu::MTK_ISA
