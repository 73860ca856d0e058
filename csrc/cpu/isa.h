// Which instruction set the CPU kernels use, decided once per process.
#pragma once

#include <cstdlib>
#include <string_view>

namespace mtk::cpu {

enum class Isa { generic, avx2, avx512 };

// MTKERNELS_CPU_ISA=generic|avx2 lowers the choice, for tests; it never raises it.
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

}  // namespace mtk::cpu
