#include "lora_embedding_kernels.h"

namespace mtk::cpu {

const EmbeddingRows embedding_generic[3] = {generic::embedding_rows<float>, generic::embedding_rows<bf16>, generic::embedding_rows<f16>};

}  // namespace mtk::cpu
