#include "lora_items.h"

#ifdef MTK_X86_KERNELS

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// No standard template may be instantiated below: the linker could pick that copy for older CPUs.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MTK_ISA_AVX512
#include "producer_kernels.h"

namespace mtk::cpu {

const ProducerRows producer_avx512[3] = {avx512::producer<float>, avx512::producer<bf16>, avx512::producer<f16>};

}  // namespace mtk::cpu

#endif
