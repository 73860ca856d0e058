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

// The larger; b where either is NaN.
MTK_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
MTK_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }

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
// v with its upper 16 bits rounded to nearest even, and anything below.
MTK_INLINE __m512i round_bf16(vf v) {
  const __m512i u = _mm512_castps_si512(v), up = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  const __m512i r = _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), up, _mm512_set1_epi32(1));
  return _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
MTK_INLINE __m256i narrow_bf16(vf v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(v), 16)); }

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

// v as elements of a type hold it.
MTK_INLINE vf vround(const float*, vf v) { return v; }
MTK_INLINE vf vround(const bf16*, vf v) { return _mm512_castsi512_ps(_mm512_and_si512(round_bf16(v), _mm512_set1_epi32(-0x10000))); }
MTK_INLINE vf vround(const f16*, vf v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }

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

constexpr int kKeepBytes = 16;

// Keep bits of 128 columns from column block `block`. threshold < 65536. Counters sit in the low halves of 64-bit lanes, where a product
// leaves both its words; of the first two rounds only the words that depend on the column are vectors.
MTK_INLINE void dropout_keep(const DropoutKey& key, uint32_t block, uint32_t threshold, uint8_t* bits) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxMul0), m1 = _mm512_set1_epi64(kPhiloxMul1), limit = _mm512_set1_epi16(static_cast<short>(threshold));
  // Counter order that makes the unpacks below emit columns in ascending order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const uint64_t first1 = uint64_t{kPhiloxMul1} * key.site;
  const uint64_t second0 = uint64_t{kPhiloxMul0} * (static_cast<uint32_t>(first1 >> 32) ^ key.uid ^ key.key0);
  uint32_t k0 = key.key0 + kPhiloxWeyl0, k1 = key.key1 + kPhiloxWeyl1;
  const __m512i first_c2 = _mm512_set1_epi32(static_cast<int>(key.step ^ key.key1));
  const __m512i second_c0 = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(first1) ^ k0));
  const __m512i second_c2 = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(second0 >> 32) ^ k1));
  __m512i c0[2], c1[2], c2[2], c3[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512i product = _mm512_mul_epu32(_mm512_add_epi32(order, _mm512_set1_epi64(block + 8 * h)), m0);
    const __m512i c2_first = _mm512_xor_si512(_mm512_srli_epi64(product, 32), first_c2);
    c1[h] = _mm512_mul_epu32(c2_first, m1);
    c0[h] = _mm512_xor_si512(_mm512_srli_epi64(c1[h], 32), second_c0);
    c2[h] = _mm512_xor_si512(product, second_c2);
    c3[h] = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(second0)));
  }
#pragma GCC unroll 7
  for (int round = 2; round < kDropoutRounds; ++round) {
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i p0 = _mm512_mul_epu32(c0[h], m0), p1 = _mm512_mul_epu32(c2[h], m1);
      c0[h] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p1, 32), c1[h], _mm512_set1_epi32(static_cast<int>(k0)), 0x96);
      c2[h] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p0, 32), c3[h], _mm512_set1_epi32(static_cast<int>(k1)), 0x96);
      c1[h] = p1;
      c3[h] = p0;
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512i low = _mm512_mask_blend_epi32(0xAAAA, c0[h], _mm512_slli_epi64(c1[h], 32));
    const __m512i high = _mm512_mask_blend_epi32(0xAAAA, c2[h], _mm512_slli_epi64(c3[h], 32));
    const uint32_t mask[2] = {_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(low, high), limit),
                              _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(low, high), limit)};
    std::memcpy(bits + 8 * h, mask, sizeof(mask));
  }
}

}  // namespace mtk::cpu::MTK_ISA
