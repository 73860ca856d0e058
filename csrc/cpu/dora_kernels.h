// Included by the per-ISA translation units only, like vec.h.
#pragma once

#include "dora_rows.h"
#include "vec.h"

namespace mtk::cpu::MTK_ISA {

#if defined(MTK_ISA_AVX512)
constexpr int kTileRows = 12;
#elif defined(MTK_ISA_AVX2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVecs = 2, kTileCols = kTileVecs * kWidth;
static_assert(kNormRows % kTileRows == 0 && kNormCols % kTileCols == 0, "a block is a whole number of tiles");

MTK_INLINE void square_tile(const float* w, const float* b, const float* a, int64_t rank, float scale, float* sums) {
  vf delta[kTileRows][kTileVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < kTileVecs; ++j) delta[i][j] = vzero();
  for (int64_t r = 0; r < rank; ++r, a += kNormCols, b += kNormRows) {
    const vf a0 = vload(a), a1 = vload(a + kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const vf factor = vset(b[i]);
      delta[i][0] = vfma(factor, a0, delta[i][0]);
      delta[i][1] = vfma(factor, a1, delta[i][1]);
    }
  }
  const vf s = vset(scale);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    vf sum = vload(sums + i * kWidth);
    for (int j = 0; j < kTileVecs; ++j) {
      const vf v = vfma(s, delta[i][j], vload(w + i * kNormCols + j * kWidth));
      sum = vfma(v, v, sum);
    }
    vstore(sums + i * kWidth, sum);
  }
}

static inline void add_squares(const float* w, const float* b, const float* a, int64_t rank, int64_t rows, int64_t cols, float scale, float* sums) {
  for (int64_t i = 0; i < rows; i += kTileRows)
    for (int64_t j = 0; j < cols; j += kTileCols)
      square_tile(w + i * kNormCols + j, b + i, a + j, rank, scale, sums + i * kWidth);
}

static inline void finish_norms(const float* sums, int64_t rows, float* norm) {
  for (int64_t i = 0; i < rows; ++i, sums += kWidth) {
    double sum = 0;
    for (int lane = 0; lane < kWidth; ++lane) sum += sums[lane];
    norm[i] = static_cast<float>(__builtin_sqrt(sum));
  }
}

// f(column, count) for every vector of a row, the last one with count < kWidth; 0 stands for a whole one.
template <class F>
MTK_INLINE void for_vectors(int64_t n, const F& f) {
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) f(c, 0);
  if (c < n) f(c, static_cast<int>(n - c));
}

template <class T>
MTK_INLINE vf vread(const T* p, int count) {
  return count ? vload(p, count) : vload(p);
}
template <class T>
MTK_INLINE void vwrite(T* p, vf v, int count) {
  if (count) {
    vstore(p, v, count);
  } else {
    vstore(p, v);
  }
}

template <class T>
void widen_row(const void* row, int64_t n, float* y) {
  const T* x = static_cast<const T*>(row);
  for_vectors(n, [&](int64_t c, int count) __attribute__((always_inline)) { vwrite(y + c, vread(x + c, count), count); });
}

template <class T>
void rescale_row(const void* z_row, const float* scale, const void* base_row, int64_t n, void* y_row) {
  const T *z = static_cast<const T*>(z_row), *base = static_cast<const T*>(base_row);
  T* y = static_cast<T*>(y_row);
  for_vectors(n, [&](int64_t c, int count) __attribute__((always_inline)) {
    vf v = vread(z + c, count);
    if (scale) v = vmul(v, vread(scale + c, count));
    if (base) v = vadd(v, vread(base + c, count));
    vwrite(y + c, v, count);
  });
}

template <class T>
void gradient_row(const void* dy_row, const void* z_row, const float* scale, int64_t n, bool add, void* dz_row, float* sum) {
  const T *dy = static_cast<const T*>(dy_row), *z = static_cast<const T*>(z_row);
  T* dz = static_cast<T*>(dz_row);
  for_vectors(n, [&](int64_t c, int count) __attribute__((always_inline)) {
    const vf d = vread(dy + c, count);
    vwrite(dz + c, scale ? vmul(d, vread(scale + c, count)) : d, count);
    if (z) vwrite(sum + c, vfma(d, vread(z + c, count), add ? vread(sum + c, count) : vzero()), count);
  });
}

template <class T>
void drop_row(const void* row, int64_t n, const DropoutKey& key, uint32_t threshold, float factor, void* y_row) {
  constexpr int64_t kCols = 8 * kKeepBytes;
  const T* x = static_cast<const T*>(row);
  T* y = static_cast<T*>(y_row);
  const vf f = vset(factor);
  uint8_t bits[kKeepBytes] = {};
  for (int64_t col = 0; col < n; col += kCols) {
    if (threshold <= 0xffff) dropout_keep(key, static_cast<uint32_t>(col / 8), threshold, bits);
    for_vectors(n - col < kCols ? n - col : kCols, [&](int64_t c, int count) __attribute__((always_inline)) {
      vwrite(y + col + c, vmul(vkeep(vread(x + col + c, count), bits, c), f), count);
    });
  }
}

constexpr DoraBlocks dora_blocks = {kWidth, add_squares, finish_norms};
template <class T>
constexpr DoraRows dora_rows = {widen_row<T>, rescale_row<T>, gradient_row<T>, drop_row<T>};

}  // namespace mtk::cpu::MTK_ISA
