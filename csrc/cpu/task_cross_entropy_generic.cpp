#include "task_cross_entropy_kernels.h"

namespace mtk::cpu {

const CrossEntropyRows cross_entropy_generic[3] = {generic::rows<float>, generic::rows<bf16>, generic::rows<f16>};

}  // namespace mtk::cpu
