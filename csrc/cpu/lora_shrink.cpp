#include "lora.h"

#include "../common/check.h"
#include "lora_work.h"

namespace mtk::cpu {

Tensor lora_shrink_fwd(Tensor x, Tensors A, Tensors threshold, Tensors seeds, Tensor offsets, Tensor perm, Tensor, Tensor step, Ints sites,
                       bool dropout, OptionalTensor bits) {
  LoraPlan plan(static_cast<int64_t>(sites.size()), static_cast<int64_t>(A.size()), x.size(0), offsets, perm);
  plan.set_A(A, x);
  plan.set_dropout(threshold, seeds, step, sites, dropout);
  plan.set_bits(bits, false);
  Tensor s = plan.new_s(x, promoted(x, A));
  plan.set_s(s);
  plan.zero_unowned(plan.call.s, plan.call.s_type);
  run_shrink(plan);
  return s;
}

void lora_shrink_bwd(Tensor ds, Tensor x, Tensors A, Tensors threshold, Tensors seeds, Tensor offsets, Tensor perm, Tensor, Tensor step,
                     Ints sites, bool dropout, OptionalTensor dx, Tensors dA, OptionalTensor bits) {
  LoraPlan plan(static_cast<int64_t>(sites.size()), static_cast<int64_t>(A.size()), x.size(0), offsets, perm);
  plan.set_A(A, x);
  plan.set_dropout(threshold, seeds, step, sites, dropout);
  plan.set_bits(bits, true);
  plan.set_ds(ds);
  plan.set_dx(dx, x);
  plan.set_dA(dA);
  run_backward_x(plan, x);
}

}  // namespace mtk::cpu
