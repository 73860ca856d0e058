#include "lora_kernels.h"

namespace mtk::cpu {

extern const LoraKernels lora_generic;
const LoraKernels lora_generic = {generic::kWidth, generic::lora_scratch, generic::forward,  generic::backward_dy, generic::backward_x,
                             generic::reduce_A,     generic::reduce_B, generic::base_scratch, generic::base};

}  // namespace mtk::cpu
