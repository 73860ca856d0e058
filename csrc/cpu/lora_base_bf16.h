// The frozen layer by the bfloat16 dot product: pairs of products summed in fp32, in a fixed order, subnormals flushed.
// Rows and weights stay bfloat16; a pair of neighbours along the sum is one 32-bit element.
#pragma once

#include "lora_base_kernel.h"

namespace mtk::cpu::MTK_ISA {

constexpr int64_t kBlockPairs = kBlock / 2;
constexpr int64_t kPairStride = kBlockPairs + 16;

static int64_t pair_scratch() { return kRows * kPairStride + kBlockPairs * (kBaseCols + kWidth) + kBaseRows * kBaseCols + 256; }

MTK_INLINE __m512i load_pairs(const float* p) { return _mm512_loadu_si512(p); }

// acc[M][N vectors] += x[M][pairs] panel[pairs][N vectors]
template <int kM, int kN>
static inline void pair_rows(const float* x, const float* panel, int64_t pairs, float* acc, int64_t acc_stride) {
  vf c[kM][kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) c[i][j] = vload(acc + i * acc_stride + j * kWidth);
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
static inline void pair_rest(const float* x, int64_t m, const float* panel, int64_t pairs, float* acc, int64_t acc_stride) {
  if (m == kM) return pair_rows<kM, kN>(x, panel, pairs, acc, acc_stride);
  if constexpr (kM > 1) pair_rest<kM - 1, kN>(x, m, panel, pairs, acc, acc_stride);
}

template <int kN>
static inline void pair_block(const float* x, int64_t m, const float* panel, int64_t pairs, float* acc, int64_t acc_stride) {
  for (; m >= kDotRows; m -= kDotRows, x += kDotRows * kPairStride, acc += kDotRows * acc_stride)
    pair_rows<kDotRows, kN>(x, panel, pairs, acc, acc_stride);
  if (m) pair_rest<kDotRows - 1, kN>(x, m, panel, pairs, acc, acc_stride);
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
      copy[i * kBlockPairs + pairs - 1] = 0.f;
      std::memcpy(copy + i * kBlockPairs, from + i * n_stride, static_cast<size_t>(k) * sizeof(bf16));
    }
    transpose<true>(aligned ? reinterpret_cast<const float*>(from) : copy, aligned ? n_stride / 2 : kBlockPairs, count, pairs, panel + j, width);
  }
}

// y[row0..row1][col0..col1]
static void pair_tile(const BaseCall& call, int64_t row0, int64_t row1, int64_t col0, int64_t col1, float* scratch) {
  constexpr int64_t kGroup = kDotVecs * kWidth;
  const int64_t n = col1 - col0, width = round_up(n, kWidth);
  Arena arena{scratch};
  float* x = Arena::take(&arena, kRows * kPairStride);
  float* panel = Arena::take(&arena, kBlockPairs * width);
  float* acc = Arena::take(&arena, kBaseRows * kBaseCols);
  float* copy = Arena::take(&arena, kWidth * kBlockPairs);
  fill_zero(acc, (row1 - row0) * width);
  for (const BasePart* part = call.parts; part < call.parts + call.n_parts; ++part)
    for (int64_t q = 0; q < part->K; q += kBlock) {
      const int64_t k = least(kBlock, part->K - q), pairs = (k + 1) / 2;
      for (int64_t j = 0; j < width; j += kGroup)
        pack_pairs(at<bf16>(part->w, q * part->k_stride + (col0 + j) * part->n_stride), part->k_stride, part->n_stride, k, least(kGroup, n - j),
                   least(kGroup, width - j), panel + j * kBlockPairs, copy);
      for (int64_t i = row0; i < row1; i += kRows) {
        const int64_t m = least(kRows, row1 - i);
        for (int64_t r = 0; r < m; ++r) {
          x[r * kPairStride + pairs - 1] = 0.f;
          const int64_t row = call.x_rows ? call.x_rows[i + r] : i + r;
          std::memcpy(x + r * kPairStride, at<bf16>(part->x, row * part->x_stride + q), static_cast<size_t>(k) * sizeof(bf16));
        }
        for (int64_t j = 0; j < width; j += kGroup) {
          float* to = acc + (i - row0) * width + j;
          if (width - j >= kGroup) pair_block<kDotVecs>(x, m, panel + j * kBlockPairs, pairs, to, width);
          else pair_block<1>(x, m, panel + j * kBlockPairs, pairs, to, width);
        }
      }
    }
  for (int64_t i = row0; i < row1; ++i) finish_base(call, i, acc + (i - row0) * width, col0, n);
}

}  // namespace mtk::cpu::MTK_ISA
