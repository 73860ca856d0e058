// Every kernel entry point; registration.cpp binds them to torch.ops.mtkernels_C.
#pragma once

#include "cpu/lora.h"

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace mtk {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_plan(Tensor ids, int64_t n_groups);

Tensor task_reduce_fwd(Tensor values, OptionalTensor coef, Tensor offsets, Tensor perm, Tensor tiles);
std::tuple<Tensor, Tensor> task_reduce_bwd(Tensor dsums, Tensor values, OptionalTensor coef, Tensor ids);

std::tuple<Tensor, Tensor> task_cross_entropy_fwd(Tensor logits, Tensor target, Tensor ids, int64_t ignore_index);
Tensor task_cross_entropy_bwd(Tensor dnll, Tensor logits, Tensor target, Tensor ids, Tensor lse, int64_t ignore_index);

}  // namespace cpu

namespace cuda {

Tensor task_reduce_fwd(Tensor values, OptionalTensor coef, Tensor offsets, Tensor perm, Tensor tiles);
std::tuple<Tensor, Tensor> task_reduce_bwd(Tensor dsums, Tensor values, OptionalTensor coef, Tensor ids);

}  // namespace cuda

}  // namespace mtk
