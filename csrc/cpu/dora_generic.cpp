#include "dora_kernels.h"

namespace mtk::cpu {

const DoraBlocks dora_blocks_generic = generic::dora_blocks;
const DoraRows dora_rows_generic[3] = {generic::dora_rows<float>, generic::dora_rows<bf16>, generic::dora_rows<f16>};

}  // namespace mtk::cpu
