#include "lora_items.h"

#ifdef MTK_BF16_KERNELS

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// No standard template may be instantiated below: the linker could pick that copy for older CPUs.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define MTK_ISA_AVX512BF16
#include "lora_base_bf16.h"

namespace mtk::cpu {

const BaseKernels base_avx512bf16 = {avx512bf16::scratch_of<avx512bf16::Pairs>, avx512bf16::tile_of<avx512bf16::Pairs>};

}  // namespace mtk::cpu

#endif
