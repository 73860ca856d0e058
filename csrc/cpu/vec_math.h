// Sums and exponentials of vectors; included by the per-ISA translation units only, like vec.h.
#pragma once

#include "vec.h"

namespace mtk::cpu::MTK_ISA {

typedef int32_t vi __attribute__((vector_size(4 * kWidth)));

MTK_INLINE float reduce_sum(vf x) {
  for (int width = kWidth / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// exp to about 1 ulp on [-87.33, 88]; 0 below (subnormal results flush), NaN for NaN.
MTK_INLINE vf vexp(vf x) {
  const vf lowest = vset(-87.33654f);
  const vf y = vmin(vset(88.0f), vmax(lowest, x));
  const vf shifted = y * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits now hold round(y / ln 2)
  const vf n = shifted - 12582912.0f;
  const vf r = (y - n * 0.693145752f) - n * 1.42860677e-6f;
  vf p = 1.98756915e-4f * r + 1.39819995e-3f;
  p = p * r + 8.33345191e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * (r * r) + r + 1.0f;
  const vf scale = (vf)(((vi)shifted << 23) + 0x3f800000);
  return x < lowest ? vzero() : p * scale;
}

}  // namespace mtk::cpu::MTK_ISA
