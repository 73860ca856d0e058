#include "lora.h"

#include "../common/check.h"
#include "lora_work.h"

namespace mtk::cpu {

Tensor lora_fwd(Tensor x, Tensors A, Tensors B, Tensors bias, Tensors scale, Tensors threshold, Tensors seeds, OptionalTensor gates,
                Tensor offsets, Tensor perm, Tensor, Tensor step, Ints sites, bool dropout, Tensors ys, OptionalTensor bits) {
  LoraPlan plan(static_cast<int64_t>(sites.size()), static_cast<int64_t>(A.size()), x.size(0), offsets, perm);
  plan.set_A(A, x);
  plan.set_B(B, bias, scale, gates, ys);
  plan.set_dropout(threshold, seeds, step, sites, dropout);
  plan.set_bits(bits, false);
  Tensor s = plan.new_s(x, promoted(x, A));
  plan.set_s(s);
  plan.zero_unowned(plan.call.s, plan.call.s_type);
  run_shrink(plan);
  run_expand(plan);
  return s;
}

void lora_bwd(Tensors dys, Tensor x, Tensor s, Tensors A, Tensors B, Tensors bias, Tensors scale, Tensors threshold, Tensors seeds,
              OptionalTensor gates, Tensor offsets, Tensor perm, Tensor, Tensor step, Ints sites, bool dropout, OptionalTensor dx,
              OptionalTensor e, Tensors dA, Tensors dB, Tensors dbias, OptionalTensor bits) {
  LoraPlan plan(static_cast<int64_t>(sites.size()), static_cast<int64_t>(A.size()), x.size(0), offsets, perm);
  plan.set_A(A, x);
  plan.set_B(B, bias, scale, gates, dys);
  plan.set_dropout(threshold, seeds, step, sites, dropout);
  plan.set_bits(bits, true);
  plan.set_s(s);
  plan.set_dx(dx, x);
  plan.set_e(e);
  plan.set_dA(dA);
  plan.set_dB(dB, dbias);
  for (LoraAdapter& a : plan.adapters) a.needs_d = dx || e || a.dA.data;
  const Tensor ds = plan.new_s(x, ScalarType::Float);  // not rounded between the two halves
  plan.set_ds(ds);
  run_backward_y(plan, x);
  run_backward_x(plan, x);
}

}  // namespace mtk::cpu
