// Element types of kernels, known to torch-free and CUDA-free code alike.
#pragma once

namespace mtk {

enum class Element { f32, bf16, f16 };

}  // namespace mtk
