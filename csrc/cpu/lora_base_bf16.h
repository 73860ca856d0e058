// The frozen layer by the bfloat16 dot product: pairs of products summed in fp32, in a fixed order, subnormals flushed.
// Rows and weights stay bfloat16; a pair of neighbours along the sum is one 32-bit element.
#pragma once

#include "lora_base_kernel.h"

namespace mtk::cpu::MTK_ISA {

constexpr int64_t kBasePairs = kBaseDepth / 2;
constexpr int64_t kPairStride = stride_of(kBasePairs);

MTK_INLINE __m512i load_pairs(const float* p) { return _mm512_loadu_si512(p); }

// acc[M][N vectors] (+)= x[M][pairs] panel[pairs][N vectors]
template <int kM, int kN>
static inline void pair_rows(const float* x, const float* panel, int64_t pairs, bool add, float* acc, int64_t acc_stride) {
  vf c[kM][kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) c[i][j] = add ? vload(acc + i * acc_stride + j * kWidth) : vzero();
  for (int64_t q = 0; q < pairs; ++q, panel += kN * kWidth) {
    __m512bh b[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) b[j] = (__m512bh)load_pairs(panel + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      int32_t pair;
      std::memcpy(&pair, x + i * kPairStride + q, sizeof(pair));
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) c[i][j] = _mm512_dpbf16_ps(c[i][j], a, b[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) vstore(acc + i * acc_stride + j * kWidth, c[i][j]);
}

template <int kM, int kN>
static inline void pair_rest(const float* x, int64_t m, const float* panel, int64_t pairs, bool add, float* acc, int64_t acc_stride) {
  if (m == kM) return pair_rows<kM, kN>(x, panel, pairs, add, acc, acc_stride);
  if constexpr (kM > 1) pair_rest<kM - 1, kN>(x, m, panel, pairs, add, acc, acc_stride);
}

template <int kN>
static inline void pair_block(const float* x, int64_t m, const float* panel, int64_t pairs, bool add, float* acc, int64_t acc_stride) {
  for (; m >= kDotRows; m -= kDotRows, x += kDotRows * kPairStride, acc += kDotRows * acc_stride)
    pair_rows<kDotRows, kN>(x, panel, pairs, add, acc, acc_stride);
  if (m) pair_rest<kDotRows - 1, kN>(x, m, panel, pairs, add, acc, acc_stride);
}

// panel[pairs][width] from w[k][n], `width` a multiple of kWidth, zeros beyond n and k; one of the strides is 1.
static void pack_pairs(const bf16* w, int64_t k_stride, int64_t n_stride, int64_t k, int64_t n, int64_t width, float* panel, float* copy) {
  if (n_stride == 1) {
    for (int64_t q = 0; q < k; q += 2, panel += width)
      for (int64_t j = 0; j < width; j += kWidth) {
        const __mmask16 on = first(static_cast<int>(least(kWidth, n - j)));
        const __m256i low = _mm256_maskz_loadu_epi16(on, w + q * k_stride + j);
        const __m256i high = q + 1 < k ? _mm256_maskz_loadu_epi16(on, w + (q + 1) * k_stride + j) : _mm256_setzero_si256();
        _mm512_storeu_si512(panel + j, _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
      }
    return;
  }
  const bool aligned = k % 2 == 0 && n_stride % 2 == 0;
  const int64_t pairs = (k + 1) / 2;
  if (n < width) fill_zero(panel, pairs * width);
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t count = least(kWidth, n - j);
    const bf16* from = w + j * n_stride;
    for (int64_t i = 0; i < count && !aligned; ++i) {
      copy[i * kBasePairs + pairs - 1] = 0.f;
      std::memcpy(copy + i * kBasePairs, from + i * n_stride, static_cast<size_t>(k) * sizeof(bf16));
    }
    transpose<true>(aligned ? reinterpret_cast<const float*>(from) : copy, aligned ? n_stride / 2 : kBasePairs, count, pairs, panel + j, width);
  }
}

// Rows and weights as pairs.
struct Pairs {
  static constexpr int64_t kGroup = kDotVecs * kWidth;
  // Behind the panel, rows that pack_pairs copies.
  static constexpr int64_t kBlockFloats = kRows * kPairStride, kCopyAt = kBasePairs * kBaseCols, kPanelFloats = kCopyAt + kBasePairs * kWidth;

  static void pack_panel(const BaseCall&, const BasePart& part, int64_t q, int64_t k, int64_t col0, int64_t n, float* panel) {
    for (int64_t j = 0, width = round_up(n, kWidth); k && j < n; j += kGroup)
      pack_pairs(at<bf16>(part.w, q * part.k_stride + (col0 + j) * part.n_stride), part.k_stride, part.n_stride, k, least(kGroup, n - j),
                 least(kGroup, width - j), panel + j * kBasePairs, panel + kCopyAt);
  }

  static void pack_block(const BaseCall& call, const BasePart& part, int64_t row, int64_t m, int64_t q, int64_t k, float* block) {
    for (int64_t i = 0; k && i < m; ++i, block += kPairStride) {
      block[(k + 1) / 2 - 1] = 0.f;
      const int64_t from = call.x_rows ? call.x_rows[row + i] : row + i;
      std::memcpy(block, at<bf16>(part.x, from * part.x_stride + q), static_cast<size_t>(k) * sizeof(bf16));
    }
  }

  static void dot(const float* block, int64_t m, int64_t k, const float* panel, int64_t n, bool add, float* acc, int64_t stride) {
    const int64_t pairs = (k + 1) / 2;
    for (int64_t j = 0; j < stride; j += kGroup) {
      if (stride - j >= kGroup) pair_block<kDotVecs>(block, m, panel + j * kBasePairs, pairs, add, acc + j, stride);
      else pair_block<1>(block, m, panel + j * kBasePairs, pairs, add, acc + j, stride);
    }
  }

  static float* row(float* acc, int64_t, float*) { return acc; }
};

}  // namespace mtk::cpu::MTK_ISA
