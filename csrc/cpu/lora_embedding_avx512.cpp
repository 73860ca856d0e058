#ifdef __x86_64__

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// No standard template may be instantiated below: the linker could pick that copy for older CPUs.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MTK_ISA_AVX512
#include "lora_embedding_kernels.h"

namespace mtk::cpu {

const EmbeddingRows embedding_avx512[3] = {avx512::embedding_rows<float>, avx512::embedding_rows<bf16>, avx512::embedding_rows<f16>};

}  // namespace mtk::cpu

#endif
