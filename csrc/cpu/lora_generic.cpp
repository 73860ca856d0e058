#include "lora_kernels.h"

namespace mtk::cpu {

extern const LoraKernels lora_generic;
const LoraKernels lora_generic = MTK_LORA_KERNELS(generic);

}  // namespace mtk::cpu
