// The frozen layer, shared or of one expert: one tile of its output, or of its dx, in a fixed order.
#pragma once

#include "lora_blocks.h"

namespace mtk::cpu::MTK_ISA {

// Deep enough for most sums to stay in registers from the first product to the last.
constexpr int64_t kBaseDepth = 1024;

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

// y[row0..row1][col0..col1], one rounding at the end; Form says how rows and weights lie in cache and are multiplied there.
template <class Form>
static void tile_of(const BaseCall& call, int64_t row0, int64_t row1, int64_t col0, int64_t col1, float* scratch) {
  Arena arena{scratch};
  float* block = Arena::take(&arena, Form::kBlockFloats);
  float* panel = Arena::take(&arena, Form::kPanelFloats);
  float* sums = Arena::take(&arena, kBaseRows * kBaseCols);
  const int64_t n = col1 - col0, stride = round_up(n, kWidth);
  const BasePart* last = call.parts + call.n_parts - 1;
  for (const BasePart* part = call.parts; part <= last; ++part)
    for (int64_t q = 0; q == 0 || q < part->K; q += kBaseDepth) {
      const int64_t k = least(kBaseDepth, part->K - q);
      const bool begins = part == call.parts && q == 0, ends = part == last && q + k == part->K;
      Form::pack_panel(call, *part, q, k, col0, n, panel);
      for (int64_t i = row0; i < row1; i += kRows) {
        const int64_t m = least(kRows, row1 - i);
        float* acc = begins && ends ? sums : sums + (i - row0) * stride;
        Form::pack_block(call, *part, i, m, q, k, block);
        Form::dot(block, m, k, panel, n, !begins, acc, stride);
        for (int64_t r = 0; ends && r < m; ++r, acc += stride) {
          float line[kBaseCols];
          finish_base(call, i + r, Form::row(acc, n, line), col0, n);
        }
      }
    }
}

// Both widened to fp32.
struct Widened {
  static constexpr int64_t kBlockFloats = floats_of(kBaseDepth), kPanelFloats = kBaseDepth * kBaseCols;

  static void pack_panel(const BaseCall& call, const BasePart& part, int64_t q, int64_t k, int64_t col0, int64_t n, float* panel) {
    MTK_WITH_TYPE(call.type, T, pack_dot_panel<kBaseDepth>(at<T>(part.w, q * part.k_stride + col0 * part.n_stride), part.k_stride, part.n_stride,
                                                           k, n, panel));
  }

  static void pack_block(const BaseCall& call, const BasePart& part, int64_t row, int64_t m, int64_t q, int64_t k, float* block) {
    int32_t rows[kRows];
    for (int64_t i = 0; i < m; ++i) rows[i] = call.x_rows ? call.x_rows[row + i] : static_cast<int32_t>(i);
    const int64_t from = call.x_rows ? 0 : row * part.x_stride;
    MTK_WITH_TYPE(call.type, T, pack_rows<kBaseDepth>(at<T>(part.x, from), part.x_stride, rows, m, q, k, block, nullptr, 0));
  }

  static void dot(const float* block, int64_t m, int64_t k, const float* panel, int64_t n, bool add, float* acc, int64_t stride) {
    dot_block<kBaseDepth>(block, m, k, panel, n, add, acc, stride);
  }

  // The sums of a row: where they lie, or added up from lanes in `line`.
  static float* row(float* acc, int64_t n, float* line) {
    if (n % kWidth == 0) return acc;
    dot_finish(acc, n, 1.f, line);
    return line;
  }
};

template <class Form>
static int64_t scratch_of() {
  return Form::kBlockFloats + Form::kPanelFloats + kBaseRows * kBaseCols + 256;
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
