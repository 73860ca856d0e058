#ifdef __x86_64__

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// No standard template may be instantiated below: the linker could pick that copy for older CPUs.
#pragma GCC target("avx2,fma,f16c")
#define MTK_ISA_AVX2
#include "lora_embedding_kernels.h"

namespace mtk::cpu {

const EmbeddingRows embedding_avx2[3] = {avx2::embedding_rows<float>, avx2::embedding_rows<bf16>, avx2::embedding_rows<f16>};

}  // namespace mtk::cpu

#endif
