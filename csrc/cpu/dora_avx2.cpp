#ifdef __x86_64__

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// No standard template may be instantiated below: the linker could pick that copy for older CPUs.
#pragma GCC target("avx2,fma,f16c")
#define MTK_ISA_AVX2
#include "dora_kernels.h"

namespace mtk::cpu {

const DoraBlocks dora_blocks_avx2 = avx2::dora_blocks;
const DoraRows dora_rows_avx2[3] = {avx2::dora_rows<float>, avx2::dora_rows<bf16>, avx2::dora_rows<f16>};

}  // namespace mtk::cpu

#endif
