// Moves between tensors and the fp32 blocks and panels that gemm_tile.h works on.
#pragma once

#include "gemm_tile.h"

namespace mtk::cpu::MTK_ISA {

MTK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// dst[c][r] = src[r][c]; with kPad every row of dst gets whole vectors, zeros beyond `rows`.
template <bool kPad, class S, class D>
static inline void transpose(const S* src, int64_t src_stride, int64_t rows, int64_t cols, D* dst, int64_t dst_stride) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    const int nr = static_cast<int>(least(kWidth, rows - r));
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int nc = static_cast<int>(least(kWidth, cols - c));
      vf v[kWidth];
      if (nr == kWidth && nc == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) v[i] = vload(src + (r + i) * src_stride + c);
      } else {
        for (int i = 0; i < kWidth; ++i) v[i] = i < nr ? vload(src + (r + i) * src_stride + c, nc) : vzero();
      }
      vtranspose(v);
      if ((kPad || nr == kWidth) && nc == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) vstore(dst + (c + i) * dst_stride + r, v[i]);
      } else {
        for (int i = 0; i < nc; ++i) {
          if (kPad || nr == kWidth) {
            vstore(dst + (c + i) * dst_stride + r, v[i]);
          } else {
            vstore(dst + (c + i) * dst_stride + r, v[i], nr);
          }
        }
      }
    }
  }
}

// n floats from src, zeros up to a multiple of `to`.
template <class T>
MTK_INLINE void copy_padded(const T* src, int64_t n, int64_t to, float* dst) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) vstore(dst + i, vload(src + i));
  if (i < n) {
    vstore(dst + i, vload(src + i, static_cast<int>(n - i)));
    i += kWidth;
  }
  for (const int64_t end = round_up(n, to); i < end; i += kWidth) vstore(dst + i, vzero());
}

template <class T>
MTK_INLINE void copy_out(const float* src, int64_t n, float factor, T* dst) {
  const vf f = vset(factor);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) vstore(dst + i, vmul(vload(src + i), f));
  if (i < n) vstore(dst + i, vmul(vload(src + i, static_cast<int>(n - i)), f), static_cast<int>(n - i));
}

// w[k][n], element (q, j) at src[q * k_stride + j * n_stride] with one of the strides 1, as dot_block reads it: groups of kDotVecs vectors of
// outputs, then single vectors, [k][vectors]; a last partial vector as [k / lanes][outputs][lanes]. Output j's group starts at panel + j * kDepth.
template <int64_t kDepth = kBlock, class T>
static inline void pack_dot_panel(const T* src, int64_t k_stride, int64_t n_stride, int64_t k, int64_t n, float* panel) {
  const int64_t full = n / kWidth * kWidth;
  int64_t width;
  for (int64_t j = 0; j < full; j += width) {
    width = full - j >= kDotVecs * kWidth ? kDotVecs * kWidth : kWidth;
    float* group = panel + j * kDepth;
    const T* from = src + j * n_stride;
    if (n_stride == 1) {
      for (int64_t q = 0; q < k; ++q) copy_padded(from + q * k_stride, width, kWidth, group + q * width);
    } else {
      transpose<true>(from, n_stride, width, k, group, width);
    }
  }
  if (full == n) return;
  const int lanes = tail_lanes(n);
  const int64_t outputs = kWidth / lanes;
  float* group = panel + full * kDepth;
  if (lanes == 1 && n_stride != 1) return transpose<true>(src + full * n_stride, n_stride, n - full, k, group, kWidth);
  if (lanes == 1) {
    for (int64_t q = 0; q < k; ++q) copy_padded(src + q * k_stride + full, n - full, kWidth, group + q * kWidth);
    return;
  }
  for (int64_t i = 0; i < round_up(k, lanes) / lanes * kWidth; i += kWidth) vstore(group + i, vzero());
  for (int64_t j = full; j < n; ++j)
    for (int64_t q = 0; q < k; ++q)
      group[(q / lanes * outputs + (j - full)) * lanes + q % lanes] = widen(src[q * k_stride + j * n_stride]);
}

// w[rank][n] with element (r, j) at src[r * r_stride + j * n_stride], one stride 1, as panels [n / kPanel][ranks][kPanel]; `ranks` >= rank
// leaves room for rows the caller adds.
template <class T>
static inline void pack_expand_panel(const T* src, int64_t r_stride, int64_t n_stride, int64_t rank, int64_t ranks, int64_t n, float* panel) {
  for (int64_t j = 0; j < n; j += kPanel, panel += ranks * kPanel) {
    const int64_t cols = least(kPanel, n - j);
    if (n_stride == 1) {
      for (int64_t r = 0; r < rank; ++r) copy_padded(src + r * r_stride + j, cols, kWidth, panel + r * kPanel);
    } else {
      transpose<true>(src + j * n_stride, n_stride, cols, rank, panel, kPanel);
    }
  }
}

// Bits of the last byte that holds n columns.
MTK_INLINE uint8_t last_byte(int64_t n) { return static_cast<uint8_t>(0xff >> (-n & 7)); }

// One dropout mask per adapter row, as keep bits of the block being packed: drawn, or read where they are stored.
struct KeepBits {
  DropoutKey key;
  uint32_t threshold;
  uint8_t* bits;
  const uint8_t* stored;  // of position 0, or null
  int64_t stored_stride;
  const int32_t* positions;  // of the block's rows

  static constexpr int64_t kStride = kWide / 8;

  // Row `row` of the block starting at column `col`, with ordinal `uid` in its adapter.
  MTK_INLINE void fill(KeepBits* self, int64_t row, uint32_t uid, int64_t col, int64_t cols) {
    uint8_t* out = self->bits + row * kStride;
    if (self->stored) {
      std::memcpy(out, self->stored + self->positions[row] * self->stored_stride + col / 8, static_cast<size_t>((cols + 7) / 8));
      return;
    }
    if (self->threshold > 0xffff) {
      std::memset(out, 0, kStride);
      return;
    }
    self->key.uid = uid;
    for (int64_t byte = 0; byte < (cols + 7) / 8; byte += kKeepBytes)
      dropout_keep(self->key, static_cast<uint32_t>(col / 8 + byte), self->threshold, out + byte);
  }
};

// One row of one block: dropped where keep bits say so, zeros up to a multiple of kGramCols.
template <class T>
MTK_INLINE void pack_row(const T* row, int64_t cols, float* block, const uint8_t* bits) {
  if (!bits) return copy_padded(row, cols, kGramCols, block);
  int64_t c = 0;
  for (; c + kWidth <= cols; c += kWidth) vstore(block + c, vkeep(vload(row + c), bits, c));
  if (c < cols) {
    vstore(block + c, vkeep(vload(row + c, static_cast<int>(cols - c)), bits, c));
    c += kWidth;
  }
  for (const int64_t end = round_up(cols, kGramCols); c < end; c += kWidth) vstore(block + c, vzero());
}

// blocks[cols / kDepth][m] = x[rows[m]][col .. col + cols] in fp32, floats_of(kDepth) a block; uid is the ordinal of the first row in its adapter.
template <int64_t kDepth = kBlock, class T>
static inline void pack_rows(const T* x, int64_t stride, const int32_t* rows, int64_t m, int64_t col, int64_t cols, float* blocks,
                             KeepBits* keep, uint32_t uid) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T)), kAhead = 8 * kLine;
  for (int64_t i = 0; i < m; ++i) {
    const T* row = x + rows[i] * stride + col;
    if (i + 1 < m) {
      const T* next = x + rows[i + 1] * stride + col;
      for (int64_t c = 0; c < kAhead && c < cols; c += kLine) __builtin_prefetch(next + c);
    }
    if (keep) KeepBits::fill(keep, i, uid + static_cast<uint32_t>(i), col, cols);
    for (int64_t c = 0; c < cols; c += kDepth)
      pack_row(row + c, least(kDepth, cols - c), blocks + c / kDepth * floats_of(kDepth) + i * stride_of(kDepth),
               keep ? keep->bits + i * KeepBits::kStride + c / 8 : nullptr);
  }
}

}  // namespace mtk::cpu::MTK_ISA
