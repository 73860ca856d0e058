// Kernels of the chosen instruction set, scratch, and a work queue over torch's threads.
#pragma once

#include "isa.h"
#include "lora_items.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

namespace mtk::cpu {

inline const LoraKernels& lora_kernels() {
#ifdef MTK_X86_KERNELS
  if (isa() == Isa::avx512) return lora_avx512;
  if (isa() == Isa::avx2) return lora_avx2;
#endif
  return lora_generic;
}

// Of the frozen layer, for rows and weights of one type.
inline const BaseKernels& base_kernels(Element type) {
#ifdef MTK_BF16_KERNELS
  if (type == Element::bf16 && has_bf16_dot()) return base_avx512bf16;
#else
  (void)type;
#endif
  return lora_kernels().base;
}

inline Element element_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "LoRA kernels take float32, bfloat16 or float16, got dtype #", static_cast<int>(dtype),
                  "; the reference backend takes any floating type");
  return dtype == ScalarType::Float ? Element::f32 : dtype == ScalarType::BFloat16 ? Element::bf16 : Element::f16;
}

// Kept by the thread between calls: fresh pages cost more than most items.
inline float* thread_scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t size = 0;
  if (size < floats) {
    buffer.reset();
    size = 0;
    buffer.reset(static_cast<float*>(::operator new(static_cast<size_t>(floats) * sizeof(float), std::align_val_t(64))));
    size = floats;
  }
  return buffer.get();
}

// run(i, scratch) for every i in [0, n), each taken by whichever thread is free; in order when there is one thread.
template <class F>
void run_items(int64_t n, int64_t scratch_floats, const F& run) {
  if (n == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(n, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    float* scratch = thread_scratch(scratch_floats);
    for (int64_t i = next++; i < n; i = next++) run(i, scratch);
  });
}

}  // namespace mtk::cpu
