// The CUDA device and stream torch is on, for code compiled without CUDA headers.
#pragma once

#include "check.h"
#include "element.h"

#include <torch/csrc/stable/accelerator.h>

// Weak: a CPU-only torch lacks it, and must still load the extension.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace mtk {

class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch is built without CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline Element element_of(const Tensor& t) {
  check_floating("values", t);
  return t.scalar_type() == ScalarType::Float      ? Element::f32
         : t.scalar_type() == ScalarType::BFloat16 ? Element::bf16
                                                   : Element::f16;
}

inline void check_cuda(const char* name, const Tensor& t, const Tensor& values) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == values.get_device_index(), name,
                  " is not on the device of the others (cuda:", values.get_device_index(), "); move it there");
}

// `error` is nullptr or what a launch reported.
inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(!error, op, ": CUDA launch failed: ", error);
}

}  // namespace mtk
