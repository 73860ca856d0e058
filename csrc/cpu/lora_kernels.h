// The work items of lora.cpp for one instruction set.
#pragma once

#include "gemm_pack.h"
#include "lora_items.h"

namespace mtk::cpu::MTK_ISA {

static_assert(kItemCols % kBlock == 0, "items own whole blocks");

#define MTK_WITH_TYPE(element, T, ...)                          \
  switch (element) {                                                     \
    case Element::f32: { using T = float; __VA_ARGS__; } break;          \
    case Element::bf16: { using T = bf16; __VA_ARGS__; } break;          \
    case Element::f16: { using T = f16; __VA_ARGS__; } break;            \
  }

MTK_INLINE void fill_zero(float* p, int64_t n) {
  if (n > 0) std::memset(p, 0, static_cast<size_t>(n) * sizeof(float));
}

// Scratch of one item, carved from the worker's buffer in cache-line steps.
struct Arena {
  float* next;
  MTK_INLINE float* take(Arena* self, int64_t floats) {
    float* p = self->next;
    self->next += round_up(floats, 16) + 16;
    return p;
  }
};

constexpr int64_t kBitsFloats = kRows * KeepBits::kStride / 4;

MTK_INLINE int64_t rank_stride(int64_t ranks) { return round_up(ranks, kWidth > kGramRanks ? kWidth : kGramRanks); }

static int64_t lora_scratch(int64_t rank, int64_t rows) {
  const int64_t wide = rank_stride(rank + 1), pad = 64;
  return kWideBlocks * kBlockFloats + kBitsFloats + 2 * kWide * wide + 2 * rows * wide + kRows * wide + 8 * pad;
}

MTK_INLINE bool init_keep(const LoraCall& call, const LoraAdapter& a, uint8_t* bits, KeepBits* keep) {
  keep->key = {static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32), 0, call.site, call.step};
  keep->threshold = a.threshold;
  keep->bits = bits;
  return a.threshold > 0;
}

template <class T>
MTK_INLINE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

static void pack_block(Element type, const RowMatrix& x, const int32_t* rows, int64_t m, int64_t col, int64_t cols, float* block,
                       KeepBits* keep, int64_t uid) {
  MTK_WITH_TYPE(type, T, pack_rows(static_cast<const T*>(x.data), x.stride, rows, m, col, cols, block, keep, static_cast<uint32_t>(uid)));
}

static void expand_into(Element type, const RowMatrix& y, const int32_t* rows, int64_t m, int64_t col, int64_t cols, const float* s,
                        int64_t s_stride, const float* panel, int64_t rank, float factor, const KeepBits* keep) {
  MTK_WITH_TYPE(type, T, {
    T* out[kRows];
    for (int64_t i = 0; i < m; ++i) out[i] = static_cast<T*>(y.data) + rows[i] * y.stride;
    expand_block(out, m, col, cols, s, s_stride, panel, rank, factor, keep ? keep->bits : nullptr, KeepBits::kStride);
  });
}

// Writes S to the tensor and leaves scale * S, with the bias's column, in `s`.
static void finish_s(const LoraCall& call, const LoraItem& item, const float* acc, int64_t acc_stride, float* s, int64_t s_stride) {
  const LoraAdapter& a = *item.adapter;
  for (int64_t i = item.row0; i < item.row1; ++i, acc += acc_stride, s += s_stride) {
    fill_zero(s, s_stride);
    dot_finish(acc, a.rank, a.keep_factor, s);
    MTK_WITH_TYPE(call.s_type, T, {
      T* row = static_cast<T*>(call.s.data) + (a.first_row + i) * call.s.stride;
      copy_out(s, a.rank, 1.f, row);
      if (call.s_cols > a.rank) std::memset(static_cast<void*>(row + a.rank), 0, static_cast<size_t>(call.s_cols - a.rank) * sizeof(T));
    });
    for (int64_t j = 0; j < s_stride; j += kWidth) vstore(s + j, vmul(vload(s + j), vset(a.scale)));
    if (a.bias) s[a.rank] = a.scale;
  }
}

// s[m][s_stride] = scale * S of the adapter's rows [row, row + m), with the bias's column.
static void load_s(const LoraCall& call, const LoraAdapter& a, int64_t row, int64_t m, float* s, int64_t s_stride) {
  for (int64_t i = 0; i < m; ++i, s += s_stride) {
    fill_zero(s, s_stride);
    MTK_WITH_TYPE(call.s_type, T, copy_padded(at<T>(call.s.data, (a.first_row + row + i) * call.s.stride), a.rank, kWidth, s));
    for (int64_t j = 0; j < s_stride; j += kWidth) vstore(s + j, vmul(vload(s + j), vset(a.scale)));
    if (a.bias) s[a.rank] = a.scale;
  }
}

// s[m][s_stride] = scale * dS, its planes summed in order.
static void load_ds(const LoraCall& call, const LoraAdapter& a, int64_t row, int64_t m, float* s, int64_t s_stride) {
  const int64_t lanes = round_up(a.rank, kWidth), plane = a.n_rows * lanes;
  for (int64_t i = 0; i < m; ++i, s += s_stride) {
    float* sum = a.dS + (row + i) * lanes;
    fill_zero(s, s_stride);
    dot_finish_planes(sum, plane, call.planes, a.rank, a.scale, s);
  }
}

static void forward(const LoraCall& call, const LoraItem& item, float* scratch) {
  const LoraAdapter& a = *item.adapter;
  const int64_t acc_stride = round_up(a.rank, kWidth), s_stride = rank_stride(a.ranks()), n_rows = item.row1 - item.row0;
  Arena arena{scratch};
  float* blocks = Arena::take(&arena, kWideBlocks * kBlockFloats);
  KeepBits keep;
  const bool dropout = init_keep(call, a, reinterpret_cast<uint8_t*>(Arena::take(&arena, kBitsFloats)), &keep);
  float* panel = Arena::take(&arena, kWide * s_stride);
  float* acc = Arena::take(&arena, n_rows * acc_stride);
  float* s = Arena::take(&arena, n_rows * s_stride);
  fill_zero(acc, n_rows * acc_stride);
  for (int64_t col = 0; a.rank && col < call.D; col += kWide) {
    const int64_t cols = least(kWide, call.D - col);
    for (int64_t c = 0; c < cols; c += kBlock)
      MTK_WITH_TYPE(call.factor_type, T, pack_dot_panel(at<T>(a.A, col + c), 1, call.D, least(kBlock, cols - c), a.rank, panel + c * s_stride));
    for (int64_t i = item.row0; i < item.row1; i += kRows) {
      const int64_t m = least(kRows, item.row1 - i);
      pack_block(call.x_type, call.x, a.rows + i, m, col, cols, blocks, dropout ? &keep : nullptr, i);
      for (int64_t c = 0; c < cols; c += kBlock)
        dot_block(blocks + c / kBlock * kBlockFloats, m, least(kBlock, cols - c), panel + c * s_stride, a.rank,
                  acc + (i - item.row0) * acc_stride, acc_stride);
    }
  }
  finish_s(call, item, acc, acc_stride, s, s_stride);
  for (int64_t col = 0; a.ranks() && col < call.O; col += kWide) {
    const int64_t cols = least(kWide, call.O - col);
    MTK_WITH_TYPE(call.factor_type, T, {
      pack_expand_panel(at<T>(a.B, col * a.rank), 1, a.rank, a.rank, a.ranks(), cols, panel);
      for (int64_t j = 0; a.bias && j < cols; j += kPanel)
        copy_padded(at<T>(a.bias, col + j), least(kPanel, cols - j), kWidth, panel + (j / kPanel * a.ranks() + a.rank) * kPanel);
    });
    for (int64_t i = item.row0; i < item.row1; i += kRows)
      expand_into(call.x_type, call.y, a.rows + i, least(kRows, item.row1 - i), col, cols, s + (i - item.row0) * s_stride, s_stride, panel,
                  a.ranks(), 1.f, nullptr);
  }
}

// Gradient block g[ranks][kBlock] of columns [col, col + cols) of B^T, to its tensors.
static void finish_B(const LoraCall& call, const LoraAdapter& a, const float* g, int64_t col, int64_t cols) {
  MTK_WITH_TYPE(call.factor_type, T, {
    transpose<false>(g, kBlock, a.rank, cols, static_cast<T*>(a.dB) + col * a.rank, a.rank);
    if (a.bias) copy_out(g + a.rank * kBlock, cols, 1.f, static_cast<T*>(a.dbias) + col);
  });
}

static void finish_A(const LoraCall& call, const LoraAdapter& a, const float* g, int64_t col, int64_t cols) {
  MTK_WITH_TYPE(call.factor_type, T, {
    for (int64_t r = 0; r < a.rank; ++r) copy_out(g + r * kBlock, cols, a.keep_factor, static_cast<T*>(a.dA) + r * call.D + col);
  });
}

MTK_INLINE void store_partial(const float* g, int64_t ranks, int64_t cols, float* partial, int64_t stride) {
  for (int64_t r = 0; r < ranks; ++r) copy_out(g + r * kBlock, cols, 1.f, partial + r * stride);
}

MTK_INLINE void sum_partials(const float* partial, int64_t groups, int64_t ranks, int64_t stride, int64_t cols, float* g) {
  for (int64_t r = 0; r < ranks; ++r)
    for (int64_t j = 0; j < cols; j += kWidth) {
      const int n = static_cast<int>(least(kWidth, cols - j));
      vf sum = vzero();
      for (int64_t p = 0; p < groups; ++p) sum = vadd(sum, vload(partial + (p * ranks + r) * stride + j, n));
      vstore(g + r * kBlock + j, sum);
    }
}

// Exact zeros for the columns of an adapter that has no rows.
static void zero_B(const LoraCall& call, const LoraAdapter& a, int64_t col0, int64_t cols) {
  MTK_WITH_TYPE(call.factor_type, T, {
    if (a.rank) std::memset(static_cast<T*>(a.dB) + col0 * a.rank, 0, static_cast<size_t>(cols * a.rank) * sizeof(T));
    if (a.bias) std::memset(static_cast<T*>(a.dbias) + col0, 0, static_cast<size_t>(cols) * sizeof(T));
  });
}

static void zero_A(const LoraCall& call, const LoraAdapter& a, int64_t col0, int64_t cols) {
  MTK_WITH_TYPE(call.factor_type, T, {
    for (int64_t r = 0; r < a.rank; ++r) std::memset(static_cast<T*>(a.dA) + r * call.D + col0, 0, static_cast<size_t>(cols) * sizeof(T));
  });
}

// Planes of dS from columns [col0, col1) of dy, and those columns of dB^T and dbias. col0 begins a plane.
static void backward_dy(const LoraCall& call, const LoraItem& item, float* scratch) {
  const LoraAdapter& a = *item.adapter;
  if (a.n_rows == 0) return zero_B(call, a, item.col0, item.col1 - item.col0);
  const int64_t lanes = round_up(a.rank, kWidth), s_stride = rank_stride(a.ranks());
  Arena arena{scratch};
  float* blocks = Arena::take(&arena, kWideBlocks * kBlockFloats);
  float* panel = Arena::take(&arena, kWide * s_stride);
  float* g = Arena::take(&arena, kWide * s_stride);
  float* s = Arena::take(&arena, kRows * s_stride);
  for (int64_t col = item.col0; col < item.col1; col += kWide) {
    const int64_t cols = least(kWide, item.col1 - col);
    for (int64_t c = 0; c < cols; c += kBlock)
      MTK_WITH_TYPE(call.factor_type, T,
                    pack_dot_panel(at<T>(a.B, (col + c) * a.rank), a.rank, 1, least(kBlock, cols - c), a.rank, panel + c * s_stride));
    for (int64_t i = item.row0; i < item.row1; i += kRows) {
      const int64_t m = least(kRows, item.row1 - i);
      pack_block(call.x_type, call.dy, a.rows + i, m, col, cols, blocks, nullptr, 0);
      if (call.need_factors) load_s(call, a, i, m, s, s_stride);
      for (int64_t c = 0; c < cols; c += kBlock) {
        const float* block = blocks + c / kBlock * kBlockFloats;
        const int64_t n = least(kBlock, cols - c);
        float* dS = a.dS + ((col + c) / call.plane_cols * a.n_rows + i) * lanes;
        if ((col + c) % call.plane_cols == 0) fill_zero(dS, m * lanes);
        dot_block(block, m, n, panel + c * s_stride, a.rank, dS, lanes);
        if (call.need_factors) gram_block(s, s_stride, a.ranks(), block, m, n, i > item.row0, g + c * s_stride);
      }
    }
    for (int64_t c = 0; call.need_factors && c < cols; c += kBlock) {
      const int64_t n = least(kBlock, cols - c);
      if (a.partial_B) {
        store_partial(g + c * s_stride, a.ranks(), n, a.partial_B + item.group * a.ranks() * call.O + col + c, call.O);
      } else {
        finish_B(call, a, g + c * s_stride, col + c, n);
      }
    }
  }
}

// Columns [col0, col1) of dA and dx.
static void backward_x(const LoraCall& call, const LoraItem& item, float* scratch) {
  const LoraAdapter& a = *item.adapter;
  if (a.n_rows == 0) return zero_A(call, a, item.col0, item.col1 - item.col0);
  const int64_t s_stride = rank_stride(a.rank);
  Arena arena{scratch};
  float* blocks = Arena::take(&arena, kWideBlocks * kBlockFloats);
  KeepBits keep;
  const bool dropout = init_keep(call, a, reinterpret_cast<uint8_t*>(Arena::take(&arena, kBitsFloats)), &keep);
  float* panel = Arena::take(&arena, kWide * s_stride);
  float* g = Arena::take(&arena, kWide * s_stride);
  float* s = Arena::take(&arena, kRows * s_stride);
  for (int64_t col = item.col0; col < item.col1; col += kWide) {
    const int64_t cols = least(kWide, item.col1 - col);
    if (call.dx.data) MTK_WITH_TYPE(call.factor_type, T, pack_expand_panel(at<T>(a.A, col), call.D, 1, a.rank, a.rank, cols, panel));
    for (int64_t i = item.row0; i < item.row1; i += kRows) {
      const int64_t m = least(kRows, item.row1 - i);
      load_ds(call, a, i, m, s, s_stride);
      if (call.need_factors) {
        pack_block(call.x_type, call.x, a.rows + i, m, col, cols, blocks, dropout ? &keep : nullptr, i);
        for (int64_t c = 0; c < cols; c += kBlock)
          gram_block(s, s_stride, a.rank, blocks + c / kBlock * kBlockFloats, m, least(kBlock, cols - c), i > item.row0, g + c * s_stride);
      } else if (dropout) {
        for (int64_t q = 0; q < m; ++q) KeepBits::fill(&keep, q, static_cast<uint32_t>(i + q), col, cols);
      }
      if (call.dx.data)
        expand_into(call.x_type, call.dx, a.rows + i, m, col, cols, s, s_stride, panel, a.rank, a.keep_factor, dropout ? &keep : nullptr);
    }
    for (int64_t c = 0; call.need_factors && c < cols; c += kBlock) {
      const int64_t n = least(kBlock, cols - c);
      if (a.partial_A) {
        store_partial(g + c * s_stride, a.rank, n, a.partial_A + item.group * a.rank * call.D + col + c, call.D);
      } else {
        finish_A(call, a, g + c * s_stride, col + c, n);
      }
    }
  }
}

static void reduce_A(const LoraCall& call, const LoraItem& item, float* scratch) {
  const LoraAdapter& a = *item.adapter;
  for (int64_t col = item.col0; col < item.col1; col += kBlock) {
    const int64_t cols = least(kBlock, item.col1 - col);
    sum_partials(a.partial_A + col, item.group, a.rank, call.D, cols, scratch);
    finish_A(call, a, scratch, col, cols);
  }
}

static void reduce_B(const LoraCall& call, const LoraItem& item, float* scratch) {
  const LoraAdapter& a = *item.adapter;
  for (int64_t col = item.col0; col < item.col1; col += kBlock) {
    const int64_t cols = least(kBlock, item.col1 - col);
    sum_partials(a.partial_B + col, item.group, a.ranks(), call.O, cols, scratch);
    finish_B(call, a, scratch, col, cols);
  }
}

static int64_t base_scratch() { return kBlockFloats + kBlock * kBaseCols + kBaseRows * kBaseCols + 256; }

// y[row0..row1][col0..col1] = x w + bias: panels widened to fp32 in cache, one rounding at the end.
static void base(const BaseCall& call, int64_t row0, int64_t row1, int64_t col0, int64_t col1, float* scratch) {
  Arena arena{scratch};
  float* block = Arena::take(&arena, kBlockFloats);
  float* panel = Arena::take(&arena, kBlock * kBaseCols);
  float* acc = Arena::take(&arena, kBaseRows * kBaseCols);
  const int64_t n = col1 - col0, acc_stride = round_up(n, kWidth);
  fill_zero(acc, (row1 - row0) * acc_stride);
  int32_t rows[kRows];
  for (int32_t i = 0; i < kRows; ++i) rows[i] = i;
  for (int64_t q = 0; q < call.K; q += kBlock) {
    const int64_t k = least(kBlock, call.K - q);
    MTK_WITH_TYPE(call.type, T, {
      pack_dot_panel(at<T>(call.w, q * call.k_stride + col0 * call.n_stride), call.k_stride, call.n_stride, k, n, panel);
      for (int64_t i = row0; i < row1; i += kRows) {
        const int64_t m = least(kRows, row1 - i);
        pack_rows(at<T>(call.x, i * call.x_stride), call.x_stride, rows, m, q, k, block, nullptr, 0);
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
