#include "lora.h"

#include "../common/check.h"
#include "lora_work.h"

namespace mtk::cpu {

void lora_expand_fwd(Tensor s, Tensors B, Tensors bias, Tensors scale, OptionalTensor gates, Tensor offsets, Tensor perm, Tensor, Tensors ys) {
  STD_TORCH_CHECK(!ys.empty(), "no y; give one per target");
  LoraPlan plan(static_cast<int64_t>(ys.size()), static_cast<int64_t>(B.size()), ys[0].size(0), offsets, perm);
  plan.set_B(B, bias, scale, gates, ys);
  plan.set_s(s);
  run_expand(plan);
}

void lora_expand_bwd(Tensors dys, Tensor s, Tensors B, Tensors bias, Tensors scale, OptionalTensor gates, Tensor offsets, Tensor perm, Tensor,
                     Tensor ds, OptionalTensor e, Tensors dB, Tensors dbias) {
  STD_TORCH_CHECK(!dys.empty(), "no dy; give one per target");
  LoraPlan plan(static_cast<int64_t>(dys.size()), static_cast<int64_t>(B.size()), dys[0].size(0), offsets, perm);
  plan.set_B(B, bias, scale, gates, dys);
  plan.set_s(s);
  plan.set_ds(ds);
  plan.set_e(e);
  plan.set_dB(dB, dbias);
  for (LoraAdapter& a : plan.adapters) a.needs_d = true;
  plan.zero_unowned(plan.call.ds, plan.call.ds_type);
  run_backward_y(plan, s);
}

}  // namespace mtk::cpu
