// Included by the per-ISA translation units only, like vec.h. A sum depends on its own rows alone.
#pragma once

#include "lora_embedding_rows.h"
#include "vec.h"

namespace mtk::cpu::MTK_ISA {

// N vectors of columns at a time, so that a row is read in few streams.
template <class T, int kN>
MTK_INLINE void sum_columns(const T* ds, int64_t stride, const int64_t* places, int64_t n, float* out) {
  vf sum[kN];
  for (int j = 0; j < kN; ++j) sum[j] = vzero();
  for (int64_t k = 0; k < n; ++k) {
    const T* row = ds + places[k] * stride;
    for (int j = 0; j < kN; ++j) sum[j] = vadd(sum[j], vload(row + j * kWidth));
  }
  for (int j = 0; j < kN; ++j) vstore(out + j * kWidth, sum[j]);
}

template <class T>
void sum_rows(const void* rows, int64_t stride, const int64_t* places, int64_t n, int64_t rank, float* out) {
  const T* ds = static_cast<const T*>(rows);
  int64_t r = 0;
  for (; r + 4 * kWidth <= rank; r += 4 * kWidth) sum_columns<T, 4>(ds + r, stride, places, n, out + r);
  for (; r + kWidth <= rank; r += kWidth) sum_columns<T, 1>(ds + r, stride, places, n, out + r);
  if (r == rank) return;
  const int rest = static_cast<int>(rank - r);
  vf sum = vzero();
  for (int64_t k = 0; k < n; ++k) sum = vadd(sum, vload(ds + places[k] * stride + r, rest));
  vstore(out + r, sum, rest);
}

template <class T>
constexpr EmbeddingRows embedding_rows = {sum_rows<T>};

}  // namespace mtk::cpu::MTK_ISA
