// Which instruction set the CPU kernels use, decided once per process.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace mtk::cpu {

enum class Isa { generic, avx2, avx512 };

// MTKERNELS_CPU_ISA=generic|avx2|avx512 lowers the choice, for tests; it never raises it.
inline Isa detect_isa() {
  Isa best = Isa::generic;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
#endif
  const char* wanted = std::getenv("MTKERNELS_CPU_ISA");
  const std::string_view name = wanted ? wanted : "";
  if (name == "generic") return Isa::generic;
  if (name == "avx2" && best == Isa::avx512) return Isa::avx2;
  return best;
}

inline Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

inline bool isa_is_free() {
  const char* wanted = std::getenv("MTKERNELS_CPU_ISA");
  return !wanted || !*wanted;
}

// AVX512-BF16. False whenever MTKERNELS_CPU_ISA is set.
inline bool has_bf16_dot() {
#ifdef __x86_64__
  static const bool found = [] {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    return isa_is_free() && isa() == Isa::avx512 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
  }();
  return found;
#else
  return false;
#endif
}

}  // namespace mtk::cpu
