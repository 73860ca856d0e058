#include "lora_items.h"

#ifdef MTK_X86_KERNELS

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// No standard template may be instantiated below: the linker could pick that copy for older CPUs.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MTK_ISA_AVX512
#include "lora_kernels.h"

namespace mtk::cpu {

extern const LoraKernels lora_avx512;
const LoraKernels lora_avx512 = MTK_LORA_KERNELS(avx512);

}  // namespace mtk::cpu

#endif
