// Every kernel entry point; registration.cpp binds them to torch.ops.mtkernels_C.
#pragma once

#include "cpu/lora.h"

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace mtk {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_plan(Tensor ids, int64_t n_groups);

// s is written whole; dA is written, and an empty one is not wanted.
void lora_embedding_fwd(Tensor token, std::vector<Tensor> A, Tensor ids, Tensor offsets, Tensor perm, Tensor tiles, Tensor s);
void lora_embedding_bwd(Tensor ds, Tensor token, int64_t padding, Tensor ids, Tensor offsets, Tensor perm, Tensor tiles,
                        std::vector<Tensor> dA);

// Keep bits [positions, ceil(n_cols / 8)].
Tensor lora_dropout_mask(Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int64_t site, int64_t n_cols);

Tensor dora_norm(Tensor weight, std::vector<Tensor> A, std::vector<Tensor> B, Tensor scale);
Tensor dora_dropout(Tensor x, Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int64_t site);
Tensor dora_fwd(Tensor z, OptionalTensor base, Tensor scale, Tensor ids);
std::tuple<Tensor, Tensor> dora_bwd(Tensor dy, OptionalTensor z, Tensor scale, Tensor ids, Tensor offsets, Tensor perm, Tensor tiles);

Tensor task_reduce_fwd(Tensor values, OptionalTensor coef, Tensor offsets, Tensor perm, Tensor tiles);
std::tuple<Tensor, Tensor> task_reduce_bwd(Tensor dsums, Tensor values, OptionalTensor coef, Tensor ids);

std::tuple<Tensor, Tensor> task_cross_entropy_fwd(Tensor logits, Tensor target, Tensor ids, int64_t ignore_index);
Tensor task_cross_entropy_bwd(Tensor dnll, Tensor logits, Tensor target, Tensor ids, Tensor lse, int64_t ignore_index);

}  // namespace cpu

namespace cuda {

Tensor lora_dropout_mask(Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int64_t site, int64_t n_cols);

Tensor task_reduce_fwd(Tensor values, OptionalTensor coef, Tensor offsets, Tensor perm, Tensor tiles);
std::tuple<Tensor, Tensor> task_reduce_bwd(Tensor dsums, Tensor values, OptionalTensor coef, Tensor ids);

}  // namespace cuda

}  // namespace mtk
