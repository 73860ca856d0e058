#include "lora_items.h"

#ifdef MTK_X86_KERNELS

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// No standard template may be instantiated below: the linker could pick that copy for older CPUs.
#pragma GCC target("avx2,fma,f16c")
#define MTK_ISA_AVX2
#include "producer_kernels.h"

namespace mtk::cpu {

const ProducerRows producer_avx2[3] = {avx2::producer<float>, avx2::producer<bf16>, avx2::producer<f16>};

}  // namespace mtk::cpu

#endif
