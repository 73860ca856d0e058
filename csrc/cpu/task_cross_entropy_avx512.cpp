#ifdef __x86_64__

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// No standard template may be instantiated below: the linker could pick that copy for older CPUs.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MTK_ISA_AVX512
#include "task_cross_entropy_kernels.h"

namespace mtk::cpu {

const CrossEntropyRows cross_entropy_avx512[3] = {avx512::rows<float>, avx512::rows<bf16>, avx512::rows<f16>};

}  // namespace mtk::cpu

#endif
