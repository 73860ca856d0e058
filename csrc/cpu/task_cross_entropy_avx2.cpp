#ifdef __x86_64__

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// No standard template may be instantiated below: the linker could pick that copy for older CPUs.
#pragma GCC target("avx2,fma,f16c")
#define MTK_ISA_AVX2
#include "task_cross_entropy_kernels.h"

namespace mtk::cpu {

const CrossEntropyRows cross_entropy_avx2[3] = {avx2::rows<float>, avx2::rows<bf16>, avx2::rows<f16>};

}  // namespace mtk::cpu

#endif
