// Included by the per-ISA translation units only, like vec.h. A row's arithmetic depends on its length and type alone.
#pragma once

#include "task_cross_entropy_rows.h"
#include "vec_math.h"

namespace mtk::cpu::MTK_ISA {

constexpr float kInfinity = __builtin_inff();

MTK_INLINE float reduce_max(vf x) {
  float best = x[0];
  for (int i = 1; i < kWidth; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// The first n < kWidth elements at p; -inf in the other lanes.
template <class T>
MTK_INLINE vf vload_or_minus_inf(const T* p, int n) {
  vi lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < n ? vload(p, n) : vset(-kInfinity);
}

// Four accumulators hide the latency of the adds; the tail joins the first. NaN never wins the maximum.
template <class T>
float row_max(const void* row, int64_t n) {
  const T* x = static_cast<const T*>(row);
  vf best[4] = {vset(-kInfinity), vset(-kInfinity), vset(-kInfinity), vset(-kInfinity)};
  int64_t k = 0;
  for (; k + 4 * kWidth <= n; k += 4 * kWidth)
    for (int u = 0; u < 4; ++u) best[u] = vmax(vload(x + k + u * kWidth), best[u]);
  for (; k + kWidth <= n; k += kWidth) best[0] = vmax(vload(x + k), best[0]);
  if (k < n) best[0] = vmax(vload_or_minus_inf(x + k, static_cast<int>(n - k)), best[0]);
  return reduce_max(vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
}

template <class T>
float row_sum_exp(const void* row, int64_t n, float shift, const void* next_row) {
  const T *x = static_cast<const T*>(row), *next = static_cast<const T*>(next_row);
  vf sum[4] = {vzero(), vzero(), vzero(), vzero()};
  int64_t k = 0;
  for (; k + 4 * kWidth <= n; k += 4 * kWidth)
    for (int u = 0; u < 4; ++u) {
      __builtin_prefetch(next + k + u * kWidth);
      sum[u] += vexp(vload(x + k + u * kWidth) - shift);
    }
  for (; k + kWidth <= n; k += kWidth) sum[0] += vexp(vload(x + k) - shift);
  if (k < n) sum[0] += vexp(vload_or_minus_inf(x + k, static_cast<int>(n - k)) - shift);
  return reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// dx = scale * exp(x - lse)
template <class T>
void row_softmax(const void* row, int64_t n, float lse, float scale, void* drow, const void* next_row) {
  const T *x = static_cast<const T*>(row), *next = static_cast<const T*>(next_row);
  T* dx = static_cast<T*>(drow);
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) {
    __builtin_prefetch(next + k);
    vstore(dx + k, scale * vexp(vload(x + k) - lse));
  }
  if (k < n) {
    const int rest = static_cast<int>(n - k);
    vstore(dx + k, scale * vexp(vload(x + k, rest) - lse), rest);
  }
}

template <class T>
constexpr CrossEntropyRows rows = {row_max<T>, row_sum_exp<T>, row_softmax<T>};

}  // namespace mtk::cpu::MTK_ISA
