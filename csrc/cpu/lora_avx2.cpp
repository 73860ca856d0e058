#include "lora_items.h"

#ifdef MTK_X86_KERNELS

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// No standard template may be instantiated below: the linker could pick that copy for older CPUs.
#pragma GCC target("avx2,fma,f16c")
#define MTK_ISA_AVX2
#include "lora_kernels.h"

namespace mtk::cpu {

extern const LoraKernels lora_avx2;
const LoraKernels lora_avx2 = MTK_LORA_KERNELS(avx2);

}  // namespace mtk::cpu

#endif
