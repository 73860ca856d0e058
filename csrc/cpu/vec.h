#pragma once

// Included by the per-ISA translation units only, after their target pragma. Everything that depends on the instruction set lives in
// namespace mtk::cpu::MTK_ISA, so no inline function compiled for a newer CPU can be merged with one that an older CPU runs.
#include "../common/philox.h"

#include <cstdint>
#include <cstring>

#define MTK_INLINE static inline __attribute__((always_inline))

namespace mtk::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace mtk::cpu

#if defined(MTK_ISA_AVX512BF16)
#define MTK_ISA_AVX512
#define MTK_ISA avx512bf16
#elif defined(MTK_ISA_AVX512)
#define MTK_ISA avx512
#elif defined(MTK_ISA_AVX2)
#define MTK_ISA avx2
#else
#define MTK_ISA generic
#endif

namespace mtk::cpu::MTK_ISA {

MTK_INLINE float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}
MTK_INLINE uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof(u));
  return u;
}

MTK_INLINE float widen(float v) { return v; }
MTK_INLINE float widen(bf16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }

}  // namespace mtk::cpu::MTK_ISA

#if defined(MTK_ISA_AVX512)
#include "vec_avx512.h"
#elif defined(MTK_ISA_AVX2)
#include "vec_avx2.h"
#else
#include "vec_generic.h"
#endif
