#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace mtk::cpu {

using torch::stable::Tensor;

// Adds every adapter's part to y in place; returns s [T, Rmax].
Tensor lora_fwd(Tensor x, std::vector<Tensor> A, std::vector<Tensor> B, std::vector<Tensor> bias, Tensor scale, Tensor threshold,
                Tensor seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int64_t site, bool dropout, Tensor y);

// Adds the adapters' part to dx in place, if given; returns [dA..., dB..., dbias...], or nothing without need_factors.
std::vector<Tensor> lora_bwd(Tensor dy, Tensor x, Tensor s, std::vector<Tensor> A, std::vector<Tensor> B, std::vector<Tensor> bias,
                             Tensor scale, Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step,
                             int64_t site, bool dropout, std::optional<Tensor> dx, bool need_factors);

// The frozen layer for 16-bit types where the CPU cannot multiply them: x w^T + bias, and dy w.
Tensor lora_base_linear(Tensor x, Tensor w, std::optional<Tensor> bias);
Tensor lora_base_dx(Tensor dy, Tensor w);

// Whether matmul in torch is fast for bfloat16 (or float16) on this CPU. False whenever MTKERNELS_CPU_ISA is set.
bool cpu_has_fast_16bit(bool fp16);

}  // namespace mtk::cpu
