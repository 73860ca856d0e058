#pragma once

#include <immintrin.h>

namespace mtk::cpu::MTK_ISA {

constexpr int kWidth = 16;
using vf = __m512;

MTK_INLINE vf vzero() { return _mm512_setzero_ps(); }
MTK_INLINE vf vset(float v) { return _mm512_set1_ps(v); }
MTK_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
MTK_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
MTK_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }

// `lanes` floats repeated over the vector.
template <int lanes>
MTK_INLINE vf vrepeat(const float* p) {
  static_assert(lanes == 1 || lanes == 2 || lanes == 4, "lanes");
  if constexpr (lanes == 1) return _mm512_set1_ps(*p);
  if constexpr (lanes == 2) {
    double pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_castpd_ps(_mm512_set1_pd(pair));
  }
  return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
}

MTK_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
MTK_INLINE float widen(f16 v) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(v.bits))); }
MTK_INLINE vf widen_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
MTK_INLINE __m256i narrow_bf16(vf v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
}

MTK_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
MTK_INLINE vf vload(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
MTK_INLINE vf vload(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
MTK_INLINE vf vload(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
MTK_INLINE vf vload(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
MTK_INLINE vf vload(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }

MTK_INLINE void vstore(float* p, vf v) { _mm512_storeu_ps(p, v); }
MTK_INLINE void vstore(bf16* p, vf v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
MTK_INLINE void vstore(f16* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
MTK_INLINE void vstore(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
MTK_INLINE void vstore(bf16* p, vf v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(v)); }
MTK_INLINE void vstore(f16* p, vf v, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Zero where the keep bit is clear; `column` is a multiple of kWidth.
MTK_INLINE vf vkeep(vf v, const uint8_t* bits, int64_t column) {
  uint16_t mask;
  std::memcpy(&mask, bits + column / 8, sizeof(mask));
  return _mm512_maskz_mov_ps(mask, v);
}

MTK_INLINE void vtranspose(vf (&r)[16]) {
  vf t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

MTK_INLINE void mul_wide(__m512i a, __m512i b, __m512i& hi, __m512i& lo) {
  const __m512i even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  hi = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  lo = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

constexpr int kKeepBytes = 16;

// Keep bits of 128 columns from column block `block`. threshold < 65536.
MTK_INLINE void dropout_keep(const DropoutKey& key, uint32_t block, uint32_t threshold, uint8_t* bits) {
  const __m512i m0 = _mm512_set1_epi32(static_cast<int>(kPhiloxMul0)), m1 = _mm512_set1_epi32(static_cast<int>(kPhiloxMul1));
  // Counter order that makes the unpacks below emit columns in ascending order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i c0 = _mm512_add_epi32(order, _mm512_set1_epi32(static_cast<int>(block)));
  __m512i c1 = _mm512_set1_epi32(static_cast<int>(key.uid));
  __m512i c2 = _mm512_set1_epi32(static_cast<int>(key.site)), c3 = _mm512_set1_epi32(static_cast<int>(key.step));
  uint32_t k0 = key.key0, k1 = key.key1;
#pragma GCC unroll 7
  for (int round = 0; round < kDropoutRounds; ++round) {
    __m512i h0, l0, h1, l1;
    mul_wide(c0, m0, h0, l0);
    mul_wide(c2, m1, h1, l1);
    c0 = _mm512_ternarylogic_epi32(h1, c1, _mm512_set1_epi32(static_cast<int>(k0)), 0x96);
    c2 = _mm512_ternarylogic_epi32(h0, c3, _mm512_set1_epi32(static_cast<int>(k1)), 0x96);
    c1 = l1;
    c3 = l0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  const __m512i u0 = _mm512_unpacklo_epi32(c0, c1), u1 = _mm512_unpackhi_epi32(c0, c1);
  const __m512i u2 = _mm512_unpacklo_epi32(c2, c3), u3 = _mm512_unpackhi_epi32(c2, c3);
  const __m512i v[4] = {_mm512_unpacklo_epi64(u0, u2), _mm512_unpackhi_epi64(u0, u2), _mm512_unpacklo_epi64(u1, u3),
                        _mm512_unpackhi_epi64(u1, u3)};
  const __m512i limit = _mm512_set1_epi16(static_cast<short>(threshold));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint32_t mask = _mm512_cmpge_epu16_mask(v[i], limit);
    std::memcpy(bits + 4 * i, &mask, sizeof(mask));
  }
}

}  // namespace mtk::cpu::MTK_ISA
