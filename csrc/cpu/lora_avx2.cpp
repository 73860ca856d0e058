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
const LoraKernels lora_avx2 = {avx2::kWidth, avx2::lora_scratch, avx2::forward,  avx2::backward_dy, avx2::backward_x,
                             avx2::reduce_A,     avx2::reduce_B, avx2::base_scratch, avx2::base};

}  // namespace mtk::cpu

#endif
