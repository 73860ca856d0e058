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
const LoraKernels lora_avx512 = {avx512::kWidth, avx512::lora_scratch, avx512::forward,  avx512::backward_dy, avx512::backward_x,
                             avx512::reduce_A,     avx512::reduce_B, avx512::base_scratch, avx512::base};

}  // namespace mtk::cpu

#endif
