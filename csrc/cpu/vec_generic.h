#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mtk::cpu::MTK_ISA {

constexpr int kWidth = 4;
typedef float vf __attribute__((vector_size(16)));

MTK_INLINE vf vzero() { return vf{0, 0, 0, 0}; }
MTK_INLINE vf vset(float v) { return vf{v, v, v, v}; }
MTK_INLINE vf vadd(vf a, vf b) { return a + b; }
MTK_INLINE vf vmul(vf a, vf b) { return a * b; }
MTK_INLINE vf vfma(vf a, vf b, vf c) {
#if defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The larger; b where either is NaN.
MTK_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
MTK_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

template <int lanes>
MTK_INLINE vf vrepeat(const float* p) {
  static_assert(lanes == 1, "lanes");
  return vset(*p);
}

MTK_INLINE float widen(f16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest << 13));
  // Rebias by a multiplication: exact, and right for subnormals.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000u)));
}
MTK_INLINE void narrow(float* p, float v) { *p = v; }
MTK_INLINE void narrow(bf16* p, float v) {
  const uint32_t u = to_bits(v);
  p->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
MTK_INLINE void narrow(f16* p, float v) {
  const uint32_t u = to_bits(v), sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
  uint32_t h;
  if (rest > 0x7f800000u) {
    h = 0x7e00u;
  } else if (rest >= 0x477ff000u) {
    h = 0x7c00u;
  } else if (rest < 0x38800000u) {
    // Below the normal range: adding 0.5 leaves the fp16 subnormal in the low mantissa bits, rounded to nearest even.
    h = to_bits(from_bits(rest) + 0.5f) - 0x3f000000u;
  } else {
    h = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | h);
}

template <class T>
MTK_INLINE vf vload(const T* p) {
  return vf{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
MTK_INLINE vf vload(const T* p, int n) {
  vf v = vzero();
  for (int i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
}
template <class T>
MTK_INLINE void vstore(T* p, vf v) {
  for (int i = 0; i < kWidth; ++i) narrow(p + i, v[i]);
}
template <class T>
MTK_INLINE void vstore(T* p, vf v, int n) {
  for (int i = 0; i < n; ++i) narrow(p + i, v[i]);
}

// v as elements of a type hold it.
MTK_INLINE vf vround(const float*, vf v) { return v; }
template <class T>
MTK_INLINE vf vround(const T*, vf v) {
  T t[kWidth];
  vstore(t, v);
  return vload(t);
}

// Zero where the keep bit is clear; `column` is a multiple of kWidth.
MTK_INLINE vf vkeep(vf v, const uint8_t* bits, int64_t column) {
  const int nibble = bits[column / 8] >> (column % 8);
  for (int i = 0; i < kWidth; ++i) v[i] = (nibble >> i) & 1 ? v[i] : 0.f;
  return v;
}

MTK_INLINE void vtranspose(vf (&r)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = i + 1; j < 4; ++j) {
      const float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
  }
}

constexpr int kKeepBytes = 1;

// Keep bits of 8 columns, column block `block`.
MTK_INLINE void dropout_keep(const DropoutKey& key, uint32_t block, uint32_t threshold, uint8_t* bits) {
  *bits = dropout_keep_byte(key, block, threshold);
}

}  // namespace mtk::cpu::MTK_ISA
