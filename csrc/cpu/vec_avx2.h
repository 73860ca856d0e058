#pragma once

#include <immintrin.h>

namespace mtk::cpu::MTK_ISA {

constexpr int kWidth = 8;
using vf = __m256;

MTK_INLINE vf vzero() { return _mm256_setzero_ps(); }
MTK_INLINE vf vset(float v) { return _mm256_set1_ps(v); }
MTK_INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
MTK_INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
MTK_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

// The larger; b where either is NaN.
MTK_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
MTK_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }

// `lanes` floats repeated over the vector.
template <int lanes>
MTK_INLINE vf vrepeat(const float* p) {
  static_assert(lanes == 1 || lanes == 2, "lanes");
  if constexpr (lanes == 1) return _mm256_set1_ps(*p);
  double pair;
  std::memcpy(&pair, p, sizeof(pair));
  return _mm256_castpd_ps(_mm256_set1_pd(pair));
}

MTK_INLINE float widen(f16 v) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(v.bits))); }
MTK_INLINE vf widen_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
MTK_INLINE __m128i narrow_bf16(vf v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

MTK_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
MTK_INLINE vf vload(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
MTK_INLINE vf vload(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
template <class T>
MTK_INLINE vf vload(const T* p, int n) {
  T lanes[kWidth] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return vload(lanes);
}

MTK_INLINE void vstore(float* p, vf v) { _mm256_storeu_ps(p, v); }
MTK_INLINE void vstore(bf16* p, vf v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
MTK_INLINE void vstore(f16* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
template <class T>
MTK_INLINE void vstore(T* p, vf v, int n) {
  T lanes[kWidth];
  vstore(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// v as elements of a type hold it.
MTK_INLINE vf vround(const float*, vf v) { return v; }
MTK_INLINE vf vround(const bf16*, vf v) { return widen_bf16(narrow_bf16(v)); }
MTK_INLINE vf vround(const f16*, vf v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

// Zero where the keep bit is clear; `column` is a multiple of kWidth.
MTK_INLINE vf vkeep(vf v, const uint8_t* bits, int64_t column) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_and_si256(_mm256_set1_epi32(bits[column / 8]), bit);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(on, bit)));
}

MTK_INLINE void vtranspose(vf (&r)[8]) {
  vf t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vf low = r[i], high = r[i + 4];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

MTK_INLINE void mul_wide(__m256i a, __m256i b, __m256i& hi, __m256i& lo) {
  const __m256i even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

constexpr int kKeepBytes = 8;

// Keep bits of 64 columns from column block `block`. threshold < 65536.
MTK_INLINE void dropout_keep(const DropoutKey& key, uint32_t block, uint32_t threshold, uint8_t* bits) {
  const __m256i m0 = _mm256_set1_epi32(static_cast<int>(kPhiloxMul0)), m1 = _mm256_set1_epi32(static_cast<int>(kPhiloxMul1));
  __m256i c0 = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(static_cast<int>(block)));
  __m256i c1 = _mm256_set1_epi32(static_cast<int>(key.uid));
  __m256i c2 = _mm256_set1_epi32(static_cast<int>(key.site)), c3 = _mm256_set1_epi32(static_cast<int>(key.step));
  uint32_t k0 = key.key0, k1 = key.key1;
#pragma GCC unroll 7
  for (int round = 0; round < kDropoutRounds; ++round) {
    __m256i h0, l0, h1, l1;
    mul_wide(c0, m0, h0, l0);
    mul_wide(c2, m1, h1, l1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(h1, c1), _mm256_set1_epi32(static_cast<int>(k0)));
    c2 = _mm256_xor_si256(_mm256_xor_si256(h0, c3), _mm256_set1_epi32(static_cast<int>(k1)));
    c1 = l1;
    c3 = l0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  // Each word becomes two keep flags at bits 2w and 2w + 1 of its counter's lane.
  const __m256i limit = _mm256_set1_epi16(static_cast<short>(threshold));
  const __m256i words[4] = {c0, c1, c2, c3};
  __m256i keep = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    const __m256i ge = _mm256_cmpeq_epi16(_mm256_max_epu16(words[w], limit), words[w]);
    const __m256i flags = _mm256_set1_epi32(static_cast<int>((1u << (2 * w)) | (2u << (2 * w + 16))));
    const __m256i on = _mm256_and_si256(ge, flags);
    keep = _mm256_or_si256(keep, _mm256_or_si256(on, _mm256_srli_epi32(on, 16)));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), keep);
  for (int i = 0; i < 8; ++i) bits[i] = static_cast<uint8_t>(lanes[i]);
}

}  // namespace mtk::cpu::MTK_ISA
