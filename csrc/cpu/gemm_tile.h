// Register tiles of the three products low-rank adapters need. All accumulate in fp32; an output's sequence of operations does not depend
// on the tile it falls in, which is what keeps rows bitwise independent of their neighbours.
#pragma once

#include "vec.h"

namespace mtk::cpu::MTK_ISA {

// A block is what one reduction loop runs over: kRows rows, kBlock deep or as deep as its user says.
constexpr int64_t kBlock = 256;
constexpr int64_t kRows = 72;
// Its rows lie off a power of two apart, so that they spread over the L1 sets.
constexpr int64_t stride_of(int64_t depth) { return depth + 16; }
constexpr int64_t floats_of(int64_t depth) { return kRows * stride_of(depth); }
constexpr int64_t kBlockStride = stride_of(kBlock);
constexpr int64_t kBlockFloats = floats_of(kBlock);
// Rows are read and written this many columns at a stretch: long enough for the hardware prefetcher, which whole rows of other pages interrupt.
constexpr int64_t kWide = 1024;
constexpr int64_t kWideBlocks = kWide / kBlock;

#if defined(MTK_ISA_AVX512)
constexpr int kDotRows = 12, kDotVecs = 2, kMaxLanes = 4;
constexpr int kExpandRows = 12, kExpandVecs = 2;
constexpr int kGramRanks = 4, kGramVecs = 4;
#elif defined(MTK_ISA_AVX2)
constexpr int kDotRows = 6, kDotVecs = 2, kMaxLanes = 2;
constexpr int kExpandRows = 6, kExpandVecs = 2;
constexpr int kGramRanks = 4, kGramVecs = 2;
#else
constexpr int kDotRows = 4, kDotVecs = 2, kMaxLanes = 1;
constexpr int kExpandRows = 4, kExpandVecs = 2;
constexpr int kGramRanks = 4, kGramVecs = 2;
#endif
constexpr int kPanel = kExpandVecs * kWidth;
constexpr int kGramCols = kGramVecs * kWidth;
static_assert(kBlock % kPanel == 0 && kBlock % kGramCols == 0, "a block is a whole number of panels");

MTK_INLINE constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How many lanes of a vector one output of the last, partial vector of `n` takes: the reduction runs over lanes where outputs are few.
MTK_INLINE int tail_lanes(int64_t n) {
  const int64_t rest = n % kWidth;
  int lanes = 1;
  while (lanes < kMaxLanes && rest * 2 * lanes <= kWidth) lanes *= 2;
  return lanes;
}

// acc[m][N vectors] (+)= x[m][k] p[k][N vectors]; with lanes > 1, p is [k / lanes][kWidth / lanes outputs][lanes].
template <int64_t kDepth, int kM, int kN, int kLanes>
MTK_INLINE void dot_tile(const float* x, const float* p, int64_t k, bool add, float* acc, int64_t acc_stride) {
  vf c[kM][kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) c[i][j] = add ? vload(acc + i * acc_stride + j * kWidth) : vzero();
  for (int64_t q = 0; q < k; q += kLanes, p += kN * kWidth) {
    vf b[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) b[j] = vload(p + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      const vf a = vrepeat<kLanes>(x + i * stride_of(kDepth) + q);
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) c[i][j] = vfma(a, b[j], c[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) vstore(acc + i * acc_stride + j * kWidth, c[i][j]);
}

template <int64_t kDepth, int kM, int kN, int kLanes>
static inline void dot_rest(const float* x, int64_t m, const float* p, int64_t k, bool add, float* acc, int64_t acc_stride) {
  if (m == kM) return dot_tile<kDepth, kM, kN, kLanes>(x, p, k, add, acc, acc_stride);
  if constexpr (kM > 1) dot_rest<kDepth, kM - 1, kN, kLanes>(x, m, p, k, add, acc, acc_stride);
}

template <int64_t kDepth, int kN, int kLanes>
static inline void dot_rows(const float* x, int64_t m, const float* p, int64_t k, bool add, float* acc, int64_t acc_stride) {
  constexpr int64_t kStride = stride_of(kDepth);
  int64_t i = 0;
  for (; i + kDotRows <= m; i += kDotRows)
    dot_tile<kDepth, kDotRows, kN, kLanes>(x + i * kStride, p, k, add, acc + i * acc_stride, acc_stride);
  if (i < m) dot_rest<kDepth, kDotRows - 1, kN, kLanes>(x + i * kStride, m - i, p, k, add, acc + i * acc_stride, acc_stride);
}

// acc[m][n] (+)= x[m][k] panel[k][n] for a block and a panel kDepth deep; acc rows hold round_up(n, kWidth) floats.
template <int64_t kDepth = kBlock>
static inline void dot_block(const float* x, int64_t m, int64_t k, const float* panel, int64_t n, bool add, float* acc, int64_t acc_stride) {
  const int64_t full = n / kWidth * kWidth;
  int64_t j = 0;
  for (; j + kDotVecs * kWidth <= full; j += kDotVecs * kWidth)
    dot_rows<kDepth, kDotVecs, 1>(x, m, panel + j * kDepth, k, add, acc + j, acc_stride);
  for (; j < full; j += kWidth) dot_rows<kDepth, 1, 1>(x, m, panel + j * kDepth, k, add, acc + j, acc_stride);
  if (j == n) return;
  const int lanes = tail_lanes(n);
  if (lanes == 1) dot_rows<kDepth, 1, 1>(x, m, panel + j * kDepth, k, add, acc + j, acc_stride);
  if constexpr (kMaxLanes >= 2)
    if (lanes == 2) dot_rows<kDepth, 1, 2>(x, m, panel + j * kDepth, k, add, acc + j, acc_stride);
  if constexpr (kMaxLanes >= 4)
    if (lanes == 4) dot_rows<kDepth, 1, 4>(x, m, panel + j * kDepth, k, add, acc + j, acc_stride);
}

// out[n] = acc with the lanes of the partial vector summed, times factor. `out` may be shorter than acc, and may not overlap it.
MTK_INLINE void dot_finish(const float* acc, int64_t n, float factor, float* out) {
  const int64_t full = n / kWidth * kWidth;
  for (int64_t j = 0; j < full; j += kWidth) vstore(out + j, vmul(vload(acc + j), vset(factor)));
  const int lanes = tail_lanes(n);
  for (int64_t j = full; j < n; ++j) {
    const float* part = acc + full + (j - full) * lanes;
    float sum = part[0];
    if (lanes == 2) sum = part[0] + part[1];
    if (lanes == 4) sum = (part[0] + part[1]) + (part[2] + part[3]);
    out[j] = sum * factor;
  }
}

// The same for sums kept in `planes` planes, added in order first.
MTK_INLINE void dot_finish_planes(const float* acc, int64_t plane, int64_t planes, int64_t n, float factor, float* out) {
  const int64_t full = n / kWidth * kWidth;
  for (int64_t j = 0; j < n; j += kWidth) {
    vf sum = vzero();
    for (int64_t p = 0; p < planes; ++p) sum = vadd(sum, vload(acc + p * plane + j));
    if (j < full) {
      vstore(out + j, vmul(sum, vset(factor)));
    } else {
      float part[kWidth];
      vstore(part, sum);
      dot_finish(part, n - full, factor, out + full);
    }
  }
}

// out[row][col .. col + count] += factor * keep o (s[m][rank] p[rank][kPanel]), `count` being N whole vectors or part of one.
template <class T, int kM, int kN, bool kMasked, bool kPartial>
MTK_INLINE void expand_tile(T* const* out, int64_t col, int count, const float* s, int64_t s_stride, const float* p, int64_t rank,
                            float factor, const uint8_t* keep, int64_t keep_stride, int64_t keep_col) {
  vf c[kM][kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) c[i][j] = vzero();
  for (int64_t r = 0; r < rank; ++r, p += kPanel) {
    vf b[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) b[j] = vload(p + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      const vf a = vset(s[i * s_stride + r]);
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) c[i][j] = vfma(a, b[j], c[i][j]);
    }
  }
  const vf f = vset(factor);
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
    T* row = out[i] + col;
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      vf v = c[i][j];
      if constexpr (kMasked) v = vkeep(v, keep + i * keep_stride, keep_col + j * kWidth);
      if constexpr (kPartial) {
        vstore(row, vfma(v, f, vload(row, count)), count);
      } else {
        vstore(row + j * kWidth, vfma(v, f, vload(row + j * kWidth)));
      }
    }
  }
}

// kM rows across all panels, so that each row is one stream.
template <class T, int kM, bool kMasked>
static inline void expand_rows(T* const* out, int64_t m, int64_t col, int64_t cols, const float* s, int64_t s_stride, const float* panel,
                               int64_t rank, float factor, const uint8_t* keep, int64_t keep_stride) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  for (; i + kM <= m; i += kM, s += kM * s_stride, keep += kM * keep_stride) {
    for (int64_t ahead = i + kM; ahead < m && ahead < i + 2 * kM; ++ahead)
      for (int64_t c = 0; c < 2 * kLine && c < cols; c += kLine) __builtin_prefetch(out[ahead] + col + c, 1, 2);
    const float* p = panel;
    int64_t j = 0;
    for (; j + kPanel <= cols; j += kPanel, p += rank * kPanel)
      expand_tile<T, kM, kExpandVecs, kMasked, false>(out + i, col + j, 0, s, s_stride, p, rank, factor, keep, keep_stride, j);
    for (; j + kWidth <= cols; j += kWidth, p += kWidth)
      expand_tile<T, kM, 1, kMasked, false>(out + i, col + j, 0, s, s_stride, p, rank, factor, keep, keep_stride, j);
    if (j < cols)
      expand_tile<T, kM, 1, kMasked, true>(out + i, col + j, static_cast<int>(cols - j), s, s_stride, p, rank, factor, keep, keep_stride, j);
  }
  if constexpr (kM > 1)
    if (i < m) expand_rows<T, kM / 2, kMasked>(out + i, m - i, col, cols, s, s_stride, panel, rank, factor, keep, keep_stride);
}

// out[row][col + 0..cols] += factor * keep o (s[m][rank] panel), panel in the layout of pack_expand_panel. keep == nullptr: everything.
template <class T>
static inline void expand_block(T* const* out, int64_t m, int64_t col, int64_t cols, const float* s, int64_t s_stride, const float* panel,
                                int64_t rank, float factor, const uint8_t* keep, int64_t keep_stride) {
  if (keep) {
    expand_rows<T, kExpandRows, true>(out, m, col, cols, s, s_stride, panel, rank, factor, keep, keep_stride);
  } else {
    expand_rows<T, kExpandRows, false>(out, m, col, cols, s, s_stride, panel, rank, factor, nullptr, 0);
  }
}

// g[R][N vectors] (+)= s[m][R]^T x[m][N vectors]
template <int kR, int kN>
MTK_INLINE void gram_tile(const float* s, int64_t s_stride, const float* x, int64_t m, bool add, float* g) {
  vf c[kR][kN];
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) c[i][j] = add ? vload(g + i * kBlock + j * kWidth) : vzero();
  for (int64_t q = 0; q < m; ++q, s += s_stride, x += kBlockStride) {
    vf b[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) b[j] = vload(x + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i) {
      const vf a = vset(s[i]);
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) c[i][j] = vfma(a, b[j], c[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) vstore(g + i * kBlock + j * kWidth, c[i][j]);
}

// g[rank][kBlock] (+)= s[m][rank]^T x[m][cols]. Columns of s up to a multiple of kGramRanks, and of x up to one of kGramCols, are zeros or scratch.
static inline void gram_block(const float* s, int64_t s_stride, int64_t rank, const float* x, int64_t m, int64_t cols, bool add,
                              float* g) {
  for (int64_t j = 0; j < cols; j += kGramCols)
    for (int64_t r = 0; r < rank; r += kGramRanks) gram_tile<kGramRanks, kGramVecs>(s + r, s_stride, x + j, m, add, g + r * kBlock + j);
}

}  // namespace mtk::cpu::MTK_ISA
