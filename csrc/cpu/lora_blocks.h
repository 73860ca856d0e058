// Blocks of rows and panels of factors in and out of the kernels: types, strides, dropout, scales and gates end here.
#pragma once

#include "gemm_pack.h"
#include "lora_items.h"

namespace mtk::cpu::MTK_ISA {

static_assert(kItemCols % kBlock == 0, "items own whole blocks");

#define MTK_WITH_TYPE(element, T, ...)                          \
  switch (element) {                                            \
    case Element::f32: { using T = float; __VA_ARGS__; } break; \
    case Element::bf16: { using T = bf16; __VA_ARGS__; } break; \
    case Element::f16: { using T = f16; __VA_ARGS__; } break;   \
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

// The ranks of d, then the sum of the bias's products.
static int64_t d_stride(int64_t rank) { return round_up(rank, kWidth) + kWidth; }

static int64_t lora_scratch(int64_t ranks, int64_t targets) {
  const int64_t wide = ranks + targets * (kWidth + kGramRanks), takes = 8 + 4 * targets;
  return kWideBlocks * kBlockFloats + kBitsFloats + 2 * kWide * wide + (kForwardRows + kRows) * wide + kBlock * (wide + kWidth) + 32 * takes;
}

template <class T>
MTK_INLINE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// rows[m] of positions[m]
MTK_INLINE void rows_of(const LoraCall& call, const int32_t* positions, int64_t m, int32_t* rows) {
  if (call.slots == 1) {
    std::memcpy(rows, positions, static_cast<size_t>(m) * sizeof(int32_t));
  } else {
    for (int64_t i = 0; i < m; ++i) rows[i] = static_cast<int32_t>(positions[i] / call.slots);
  }
}

MTK_INLINE DropoutKey dropout_key(const LoraCall& call, const LoraTarget& t, const LoraAdapter& a) {
  return {static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32), 0, t.site, call.step};
}

MTK_INLINE int64_t bits_stride(const LoraCall& call) { return call.n_targets * call.bits_cols; }

MTK_INLINE KeepBits keep_bits(const LoraCall& call, int64_t target, const LoraAdapter& a, const int32_t* positions, uint8_t* bits) {
  const uint8_t* stored = call.stored_bits ? call.stored_bits + target * call.bits_cols : nullptr;
  return {dropout_key(call, call.targets[target], a), a.threshold, bits, stored, bits_stride(call), positions};
}

// Columns [col, col + cols) of the bits that `keep` holds of m rows of one target, to where the call keeps them.
static void fill_bits(const LoraCall& call, int64_t target, const KeepBits& keep, int64_t m, int64_t col, int64_t cols) {
  const size_t bytes = static_cast<size_t>((cols + 7) / 8);
  for (int64_t i = 0; i < m; ++i) {
    uint8_t* to = call.filled_bits + keep.positions[i] * bits_stride(call) + target * call.bits_cols + col / 8;
    if (keep.threshold) std::memcpy(to, keep.bits + i * KeepBits::kStride, bytes);
    else std::memset(to, 0xff, bytes);
    to[bytes - 1] &= last_byte(cols);
  }
}

MTK_INLINE bool same_mask(const KeepBits& a, const KeepBits& b) {
  return a.threshold == b.threshold && (a.threshold == 0 || (a.key.key0 == b.key.key0 && a.key.key1 == b.key.key1 && a.key.site == b.key.site));
}

// Masked blocks of x rows, remade only where the mask differs from that of the target before.
struct XBlocks {
  float* blocks;
  KeepBits keep;
  bool packed, masked;

  MTK_INLINE void start(XBlocks* self) { self->packed = self->masked = false; }

  MTK_INLINE void use_mask(XBlocks* self, const KeepBits& keep) {
    if (!same_mask(keep, self->keep)) start(self);
    self->keep = keep;
  }

  static void pack(XBlocks* self, const LoraCall& call, const int32_t* rows, int64_t m, int64_t col, int64_t cols, int64_t uid) {
    if (self->packed) return;
    KeepBits* keep = self->keep.threshold ? &self->keep : nullptr;
    MTK_WITH_TYPE(call.x_type, T, pack_rows(at<T>(call.x.data, 0), call.x.stride, rows, m, col, cols, self->blocks, keep, static_cast<uint32_t>(uid)));
    self->packed = self->masked = true;
  }

  static void mask(XBlocks* self, int64_t m, int64_t col, int64_t cols, int64_t uid) {
    for (int64_t i = 0; self->keep.threshold && !self->masked && i < m; ++i) KeepBits::fill(&self->keep, i, static_cast<uint32_t>(uid + i), col, cols);
    self->masked = true;
  }
};

static void expand_into(Element type, const RowMatrix& y, const int32_t* rows, int64_t m, int64_t col, int64_t cols, const float* s,
                        int64_t s_stride, const float* panel, int64_t rank, float factor, const KeepBits* keep) {
  MTK_WITH_TYPE(type, T, {
    T* out[kRows];
    for (int64_t i = 0; i < m; ++i) out[i] = static_cast<T*>(y.data) + rows[i] * y.stride;
    expand_block(out, m, col, cols, s, s_stride, panel, rank, factor, keep ? keep->bits : nullptr, KeepBits::kStride);
  });
}

// Columns [col, col + cols) of A as dot_block reads them, block by block, `stride` floats a column.
static void pack_A_dot(const LoraCall& call, const LoraAdapter& a, int64_t col, int64_t cols, float* panel, int64_t stride) {
  for (int64_t c = 0; c < cols; c += kBlock)
    MTK_WITH_TYPE(call.factor_type, T,
                  pack_dot_panel(at<T>(a.A.data, col + c), 1, a.A.row_stride, least(kBlock, cols - c), a.rank, panel + c * stride));
}

static void pack_A_expand(const LoraCall& call, const LoraAdapter& a, int64_t col, int64_t cols, float* panel) {
  MTK_WITH_TYPE(call.factor_type, T, pack_expand_panel(at<T>(a.A.data, col), a.A.row_stride, 1, a.rank, a.rank, cols, panel));
}

// Calls f(source, row stride, column stride) for B from row `o` on: B itself where a stride is 1, else `count` rows of it in `copy`.
template <class T, class F>
MTK_INLINE void with_unit_stride(const LoraAdapter& a, int64_t o, int64_t count, float* copy, const F& f) {
  const Factor& B = a.B;
  if (B.row_stride == 1 || B.col_stride == 1) return f(at<T>(B.data, o * B.row_stride), B.row_stride, B.col_stride);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = 0; r < a.rank; ++r) copy[i * a.rank + r] = widen(at<T>(B.data, (o + i) * B.row_stride)[r * B.col_stride]);
  f(const_cast<const float*>(copy), a.rank, int64_t{1});
}

// Rows [col, col + cols) of B, block by block; `copy` holds kBlock rows.
static void pack_B_dot(const LoraCall& call, const LoraAdapter& a, int64_t col, int64_t cols, float* panel, int64_t stride, float* copy) {
  for (int64_t c = 0; c < cols; c += kBlock) {
    const int64_t k = least(kBlock, cols - c);
    MTK_WITH_TYPE(call.factor_type, T, with_unit_stride<T>(a, col + c, k, copy, [&](const auto* B, int64_t row_stride, int64_t col_stride) {
                    pack_dot_panel(B, row_stride, col_stride, k, a.rank, panel + c * stride);
                  }));
  }
}

// The same with the bias as one more rank.
static void pack_B_expand(const LoraCall& call, const LoraAdapter& a, int64_t col, int64_t cols, float* panel, float* copy) {
  const int64_t ranks = a.ranks();
  for (int64_t c = 0; c < cols; c += kBlock) {
    const int64_t n = least(kBlock, cols - c);
    MTK_WITH_TYPE(call.factor_type, T, {
      with_unit_stride<T>(a, col + c, n, copy, [&](const auto* B, int64_t row_stride, int64_t col_stride) {
        pack_expand_panel(B, col_stride, row_stride, a.rank, ranks, n, panel + c * ranks);
      });
      for (int64_t j = 0; a.bias && j < n; j += kPanel)
        copy_padded(at<T>(a.bias, col + c + j), least(kPanel, n - j), kWidth, panel + (c + j) * ranks + a.rank * kPanel);
    });
  }
}

MTK_INLINE float coefficient(const LoraCall& call, const LoraAdapter& a, int32_t position) {
  return call.gates ? a.scale * call.gates[position] : a.scale;
}

MTK_INLINE void load_rank_row(Element type, const RowMatrix& m, int64_t row, int64_t col, int64_t n, float* to) {
  MTK_WITH_TYPE(type, T, copy_padded(at<T>(m.data, row * m.stride + col), n, kWidth, to));
}

// n values from `from`, zeros up to `cols`.
MTK_INLINE void store_rank_row(Element type, const RowMatrix& m, int64_t row, int64_t col, int64_t n, int64_t cols, const float* from) {
  MTK_WITH_TYPE(type, T, {
    T* to = static_cast<T*>(m.data) + row * m.stride + col;
    copy_out(from, n, 1.f, to);
    if (cols > n) std::memset(static_cast<void*>(to + n), 0, static_cast<size_t>(cols - n) * sizeof(T));
  });
}

// s[m][s_stride] = gate * scale * S of positions[m], with the bias's column.
static void load_s(const LoraCall& call, const LoraTarget& t, const LoraAdapter& a, const int32_t* positions, int64_t m, float* s, int64_t s_stride) {
  for (int64_t i = 0; i < m; ++i, s += s_stride) {
    const float c = coefficient(call, a, positions[i]);
    fill_zero(s, s_stride);
    load_rank_row(call.s_type, call.s, positions[i], t.s_col, a.rank, s);
    for (int64_t j = 0; j < a.rank; j += kWidth) vstore(s + j, vmul(vload(s + j), vset(c)));
    if (a.bias) s[a.rank] = c;
  }
}

// s[m][s_stride] = dS of positions[m].
static void load_ds(const LoraCall& call, const LoraTarget& t, const LoraAdapter& a, const int32_t* positions, int64_t m, float* s, int64_t s_stride) {
  for (int64_t i = 0; i < m; ++i, s += s_stride) {
    fill_zero(s, s_stride);
    load_rank_row(call.ds_type, call.ds, positions[i], t.s_col, a.rank, s);
  }
}

// Gradient block g[ranks][kBlock] of columns [col, col + cols) of B^T, to its tensors.
static void store_dB(const LoraCall& call, const LoraAdapter& a, const float* g, int64_t col, int64_t cols) {
  MTK_WITH_TYPE(call.grad_type, T, {
    const Factor& dB = a.dB;
    T* to = static_cast<T*>(dB.data) + col * dB.row_stride;
    if (dB.data && dB.col_stride == 1) transpose<false>(g, kBlock, a.rank, cols, to, dB.row_stride);
    for (int64_t r = 0; dB.data && dB.col_stride != 1 && r < a.rank; ++r) {
      T line[kBlock];
      T* row = dB.row_stride == 1 ? to + r * dB.col_stride : line;
      copy_out(g + r * kBlock, cols, 1.f, row);
      for (int64_t i = 0; row == line && i < cols; ++i) to[i * dB.row_stride + r * dB.col_stride] = line[i];
    }
    if (a.dbias) copy_out(g + a.rank * kBlock, cols, 1.f, static_cast<T*>(a.dbias) + col);
  });
}

static void store_dA(const LoraCall& call, const LoraAdapter& a, const float* g, int64_t col, int64_t cols) {
  MTK_WITH_TYPE(call.grad_type, T, {
    for (int64_t r = 0; r < a.rank; ++r) copy_out(g + r * kBlock, cols, a.keep_factor, static_cast<T*>(a.dA.data) + r * a.dA.row_stride + col);
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

}  // namespace mtk::cpu::MTK_ISA
