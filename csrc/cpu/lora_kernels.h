// The work items of the LoRA drivers for one instruction set.
#pragma once

#include "lora_base_kernel.h"
#include "lora_blocks.h"

namespace mtk::cpu::MTK_ISA {

// S of the item's rows, all targets.
static void shrink(const LoraCall& call, const LoraItem& item, float* scratch) {
  const int32_t* positions = call.groups[item.group].positions;
  const int64_t n_rows = item.row1 - item.row0;
  Arena arena{scratch};
  XBlocks x = {Arena::take(&arena, kWideBlocks * kBlockFloats), {}, false, false};
  uint8_t* bits = reinterpret_cast<uint8_t*>(Arena::take(&arena, kBitsFloats));
  int64_t width = 0;
  for (int64_t g = 0; g < call.n_targets; ++g) width += round_up(call.targets[g].adapters[item.group].rank, kWidth);
  float* panels = Arena::take(&arena, kWide * width);
  float* acc = Arena::take(&arena, n_rows * width);
  float* line = Arena::take(&arena, width);
  if (call.D == 0) fill_zero(acc, n_rows * width);
  for (int64_t col = 0; width && col < call.D; col += kWide) {
    const int64_t cols = least(kWide, call.D - col);
    for (int64_t g = 0, w = 0; g < call.n_targets; ++g) {
      const LoraAdapter& a = call.targets[g].adapters[item.group];
      const int64_t lanes = round_up(a.rank, kWidth);
      pack_A_dot(call, a, col, cols, panels + w * kWide, lanes);
      w += lanes;
    }
    for (int64_t i = item.row0; i < item.row1; i += kRows) {
      const int64_t m = least(kRows, item.row1 - i);
      int32_t rows[kRows];
      rows_of(call, positions + i, m, rows);
      XBlocks::start(&x);
      for (int64_t g = 0, w = 0; g < call.n_targets; ++g) {
        const LoraAdapter& a = call.targets[g].adapters[item.group];
        const int64_t lanes = round_up(a.rank, kWidth);
        if (a.rank == 0) continue;
        XBlocks::use_mask(&x, keep_bits(call, g, a, positions + i, bits));
        XBlocks::pack(&x, call, rows, m, col, cols, i);
        if (call.filled_bits) fill_bits(call, g, x.keep, m, col, cols);
        for (int64_t c = 0; c < cols; c += kBlock)
          dot_block(x.blocks + c / kBlock * kBlockFloats, m, least(kBlock, cols - c), panels + w * kWide + c * lanes, a.rank,
                    col + c > 0, acc + (i - item.row0) * width + w, width);
        w += lanes;
      }
    }
  }
  for (int64_t i = item.row0; i < item.row1; ++i, acc += width)
    for (int64_t g = 0, w = 0; g < call.n_targets; ++g) {
      const LoraTarget& t = call.targets[g];
      const LoraAdapter& a = t.adapters[item.group];
      dot_finish(acc + w, a.rank, a.keep_factor, line);
      store_rank_row(call.s_type, call.s, positions[i], t.s_col, a.rank, t.s_cols, line);
      w += round_up(a.rank, kWidth);
    }
}

// Adds the item's part to y.
static void expand(const LoraCall& call, const LoraItem& item, float* scratch) {
  const LoraTarget& t = call.targets[item.target];
  const LoraAdapter& a = t.adapters[item.group];
  const int32_t* positions = call.groups[item.group].positions;
  const int64_t s_stride = rank_stride(a.ranks());
  Arena arena{scratch};
  float* panel = Arena::take(&arena, kWide * s_stride);
  float* copy = Arena::take(&arena, kBlock * a.rank);
  float* s = Arena::take(&arena, (item.row1 - item.row0) * s_stride);
  load_s(call, t, a, positions + item.row0, item.row1 - item.row0, s, s_stride);
  for (int64_t col = item.col0; col < item.col1; col += kWide) {
    const int64_t cols = least(kWide, item.col1 - col);
    pack_B_expand(call, a, col, cols, panel, copy);
    for (int64_t i = item.row0; i < item.row1; i += kRows) {
      const int64_t m = least(kRows, item.row1 - i);
      int32_t rows[kRows];
      rows_of(call, positions + i, m, rows);
      expand_into(call.y_type, t.y, rows, m, col, cols, s + (i - item.row0) * s_stride, s_stride, panel, a.ranks(), 1.f, nullptr);
    }
  }
}

// Planes of d from columns [col0, col1) of dy, and those columns of dB and dbias. col0 begins a plane.
static void backward_y(const LoraCall& call, const LoraItem& item, float* scratch) {
  const LoraTarget& t = call.targets[item.target];
  const LoraAdapter& a = t.adapters[item.group];
  const LoraGroup& group = call.groups[item.group];
  const int64_t lanes = round_up(a.rank, kWidth), stride = d_stride(a.rank), s_stride = rank_stride(a.ranks());
  const bool gram = a.dB.data || a.dbias, beta = t.e && a.bias;
  // Where only the bias is wanted, its tile of ranks.
  const int64_t first = a.dB.data ? 0 : a.rank / kGramRanks * kGramRanks, last = a.dbias ? a.ranks() : a.rank;
  Arena arena{scratch};
  XBlocks dy = {Arena::take(&arena, kWideBlocks * kBlockFloats), {}, false, false};
  float* panel = Arena::take(&arena, kWide * lanes);
  float* beta_panel = Arena::take(&arena, kBlock * kWidth);
  float* copy = Arena::take(&arena, kBlock * a.rank);
  float* g = Arena::take(&arena, kWide * s_stride);
  float* s = Arena::take(&arena, kRows * s_stride);
  for (int64_t col = item.col0; col < item.col1; col += kWide) {
    const int64_t cols = least(kWide, item.col1 - col);
    if (a.needs_d) pack_B_dot(call, a, col, cols, panel, lanes, copy);
    if (item.row0 == item.row1) fill_zero(g, kWide * s_stride);
    for (int64_t i = item.row0; i < item.row1; i += kRows) {
      const int64_t m = least(kRows, item.row1 - i);
      int32_t rows[kRows];
      rows_of(call, group.positions + i, m, rows);
      MTK_WITH_TYPE(call.y_type, T, pack_rows(at<T>(t.y.data, 0), t.y.stride, rows, m, col, cols, dy.blocks, nullptr, 0));
      if (gram) load_s(call, t, a, group.positions + i, m, s, s_stride);
      for (int64_t c = 0; c < cols; c += kBlock) {
        const float* block = dy.blocks + c / kBlock * kBlockFloats;
        const int64_t k = least(kBlock, cols - c);
        if (a.needs_d) {
          float* d = a.d + ((col + c) / t.plane_cols * group.n + i) * stride;
          const bool add = (col + c) % t.plane_cols != 0;
          dot_block(block, m, k, panel + c * lanes, a.rank, add, d, stride);
          if (beta) {
            MTK_WITH_TYPE(call.factor_type, T, pack_dot_panel(at<T>(a.bias, col + c), 1, 1, k, 1, beta_panel));
            dot_block(block, m, k, beta_panel, 1, add, d + lanes, stride);
          }
        }
        if (gram) gram_block(s + first, s_stride, last - first, block, m, k, i > item.row0, g + c * s_stride + first * kBlock);
      }
    }
    for (int64_t c = 0; gram && c < cols; c += kBlock) {
      const int64_t n = least(kBlock, cols - c);
      const float* block = g + c * s_stride;
      if (a.partial_B) {
        store_partial(block, last, n, a.partial_B + item.row_group * a.ranks() * t.O + col + c, t.O);
      } else {
        store_dB(call, a, block, col + c, n);
      }
    }
  }
}

// ds and e of the item's rows, all targets.
static void finish_d(const LoraCall& call, const LoraItem& item, float* scratch) {
  const LoraGroup& group = call.groups[item.group];
  for (int64_t g = 0; g < call.n_targets; ++g) {
    const LoraTarget& t = call.targets[g];
    const LoraAdapter& a = t.adapters[item.group];
    if (!a.needs_d) continue;
    const int64_t lanes = round_up(a.rank, kWidth), stride = d_stride(a.rank), plane = group.n * stride;
    float *line = scratch, *s = scratch + lanes;
    for (int64_t i = item.row0; i < item.row1; ++i) {
      const int32_t p = group.positions[i];
      dot_finish_planes(a.d + i * stride, plane, t.planes, a.rank, 1.f, line);
      if (t.e) {
        float sum = 0.f;
        if (a.bias) dot_finish_planes(a.d + i * stride + lanes, plane, t.planes, 1, 1.f, &sum);
        load_rank_row(call.s_type, call.s, p, t.s_col, a.rank, s);
        for (int64_t r = 0; r < a.rank; ++r) sum += line[r] * s[r];
        t.e[p] = sum;
      }
      const vf c = vset(coefficient(call, a, p));
      for (int64_t r = 0; r < a.rank; r += kWidth) vstore(line + r, vmul(vload(line + r), c));
      store_rank_row(call.ds_type, call.ds, p, t.s_col, a.rank, t.s_cols, line);
    }
  }
}

// Columns [col0, col1) of dA and dx, all targets.
static void backward_x(const LoraCall& call, const LoraItem& item, float* scratch) {
  const int32_t* positions = call.groups[item.group].positions;
  Arena arena{scratch};
  XBlocks x = {Arena::take(&arena, kWideBlocks * kBlockFloats), {}, false, false};
  uint8_t* bits = reinterpret_cast<uint8_t*>(Arena::take(&arena, kBitsFloats));
  int64_t width = 0;
  for (int64_t g = 0; g < call.n_targets; ++g) width += rank_stride(call.targets[g].adapters[item.group].rank);
  float* panels = Arena::take(&arena, kWide * width);
  float* grams = Arena::take(&arena, kWide * width);
  float* s = Arena::take(&arena, kRows * width);
  for (int64_t col = item.col0; col < item.col1; col += kWide) {
    const int64_t cols = least(kWide, item.col1 - col);
    if (item.row0 == item.row1) fill_zero(grams, kWide * width);
    for (int64_t i = item.row0; i < item.row1; i += kRows) {
      const int64_t m = least(kRows, item.row1 - i);
      int32_t rows[kRows];
      rows_of(call, positions + i, m, rows);
      XBlocks::start(&x);
      for (int64_t g = 0, w = 0; g < call.n_targets; ++g) {
        const LoraTarget& t = call.targets[g];
        const LoraAdapter& a = t.adapters[item.group];
        const int64_t stride = rank_stride(a.rank);
        if (a.rank == 0) continue;
        XBlocks::use_mask(&x, keep_bits(call, g, a, positions + i, bits));
        load_ds(call, t, a, positions + i, m, s, stride);
        if (a.dA.data) {
          XBlocks::pack(&x, call, rows, m, col, cols, i);
          for (int64_t c = 0; c < cols; c += kBlock)
            gram_block(s, stride, a.rank, x.blocks + c / kBlock * kBlockFloats, m, least(kBlock, cols - c), i > item.row0,
                       grams + w * kWide + c * stride);
        }
        if (call.dx.data) {
          XBlocks::mask(&x, m, col, cols, i);
          if (i == item.row0) pack_A_expand(call, a, col, cols, panels + w * kWide);
          expand_into(call.x_type, call.dx, rows, m, col, cols, s, stride, panels + w * kWide, a.rank, a.keep_factor,
                      a.threshold ? &x.keep : nullptr);
        }
        w += stride;
      }
    }
    for (int64_t g = 0, w = 0; g < call.n_targets; ++g) {
      const LoraAdapter& a = call.targets[g].adapters[item.group];
      for (int64_t c = 0; a.dA.data && c < cols; c += kBlock) {
        const int64_t n = least(kBlock, cols - c);
        const float* block = grams + w * kWide + c * rank_stride(a.rank);
        if (a.partial_A) {
          store_partial(block, a.rank, n, a.partial_A + item.row_group * a.rank * call.D + col + c, call.D);
        } else {
          store_dA(call, a, block, col + c, n);
        }
      }
      w += rank_stride(a.rank);
    }
  }
}

static void reduce_A(const LoraCall& call, const LoraItem& item, float* scratch) {
  const LoraAdapter& a = call.targets[item.target].adapters[item.group];
  for (int64_t col = item.col0; col < item.col1; col += kBlock) {
    const int64_t cols = least(kBlock, item.col1 - col);
    sum_partials(a.partial_A + col, item.row_group, a.rank, call.D, cols, scratch);
    store_dA(call, a, scratch, col, cols);
  }
}

static void reduce_B(const LoraCall& call, const LoraItem& item, float* scratch) {
  const LoraTarget& t = call.targets[item.target];
  const LoraAdapter& a = t.adapters[item.group];
  for (int64_t col = item.col0; col < item.col1; col += kBlock) {
    const int64_t cols = least(kBlock, item.col1 - col);
    sum_partials(a.partial_B + col, item.row_group, a.ranks(), t.O, cols, scratch);
    store_dB(call, a, scratch, col, cols);
  }
}

static void keep_row(const DropoutKey& key, uint32_t threshold, int64_t n_cols, uint8_t* bits) {
  for (int64_t col = 0; col < n_cols; col += 8 * kKeepBytes) {
    uint8_t drawn[kKeepBytes] = {};
    const int64_t cols = least(8 * kKeepBytes, n_cols - col), bytes = (cols + 7) / 8;
    if (threshold <= 0xffff) dropout_keep(key, static_cast<uint32_t>(col / 8), threshold, drawn);
    drawn[bytes - 1] &= last_byte(cols);
    std::memcpy(bits + col / 8, drawn, static_cast<size_t>(bytes));
  }
}

#define MTK_LORA_KERNELS(isa) {isa::d_stride, isa::lora_scratch, isa::shrink, isa::expand, isa::backward_y, isa::finish_d, isa::backward_x, isa::reduce_A, isa::reduce_B, {isa::scratch_of<isa::Widened>, isa::tile_of<isa::Widened>}, isa::keep_row, isa::sum_rows}

}  // namespace mtk::cpu::MTK_ISA
