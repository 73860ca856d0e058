#include "../common/check.h"
#include "lora.h"
#include "lora_run.h"
#include "lora_work.h"
#include "producer_rows.h"

#include <algorithm>

namespace mtk::cpu {
namespace {

void check_pair(const Tensor& gate, const Tensor& up) {
  STD_TORCH_CHECK(gate.dim() == 2 && up.scalar_type() == gate.scalar_type(), "gate is ", describe(gate), " and up is ", describe(up),
                  "; give [T, D] of one dtype");
  check_rows("gate", gate, gate.size(0), gate.size(1));
  check_rows("up", up, gate.size(0), gate.size(1));
}

char* row_of(const Tensor& t, int64_t row) {
  return static_cast<char*>(t.data_ptr()) + row * t.stride(0) * static_cast<int64_t>(t.element_size());
}

// f(row) once for every row among the positions.
template <class F>
MakeRows for_first_positions(int64_t slots, const F& f) {
  return [=](const int32_t* positions, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
      if (positions[i] % slots == 0) f(positions[i] / slots);
  };
}

}  // namespace

std::tuple<Tensor, Tensor> swiglu_lora_shrink_fwd(Tensor gate, Tensor up, int64_t act, Tensors A, Tensors threshold, Tensors seeds, Tensor offsets,
                                                  Tensor perm, Tensor, Tensor step, Ints sites, bool dropout, OptionalTensor bits) {
  check_pair(gate, up);
  const int64_t T = gate.size(0), D = gate.size(1);
  Tensor h = empty(gate, {T, D}, gate.scalar_type());
  LoraPlan plan(static_cast<int64_t>(sites.size()), static_cast<int64_t>(A.size()), T, offsets, perm);
  plan.set_A(A, h);
  plan.set_dropout(threshold, seeds, step, sites, dropout);
  plan.set_bits(bits, false);
  Tensor s = plan.new_s(gate, promoted(gate, A));
  plan.set_s(s);
  plan.zero_unowned(plan.call.s, plan.call.s_type);
  const ProducerRows& kernels = producer_rows(plan.call.x_type);
  run_shrink(plan, for_first_positions(plan.call.slots, [&, D, act](int64_t row) {
               kernels.gate(row_of(gate, row), row_of(up, row), D, act == 1, row_of(h, row));
             }));
  return {h, s};
}

void swiglu_lora_shrink_bwd(Tensor dh, Tensor ds, Tensor gate, Tensor up, int64_t act, Tensors A, Tensors threshold, Tensors seeds, Tensor offsets,
                            Tensor perm, Tensor, Tensor step, Ints sites, bool dropout, OptionalTensor dgate, OptionalTensor dup, Tensors dA,
                            OptionalTensor bits) {
  check_pair(gate, up);
  const int64_t T = gate.size(0), D = gate.size(1);
  STD_TORCH_CHECK(dh.scalar_type() == gate.scalar_type(), "dh is ", describe(dh), ", gate is ", describe(gate), "; give one dtype");
  check_rows("dh", dh, T, D);
  LoraPlan plan(static_cast<int64_t>(sites.size()), static_cast<int64_t>(A.size()), T, offsets, perm);
  Tensor h = empty(gate, {T, D}, gate.scalar_type());
  plan.set_A(A, h);
  plan.set_dropout(threshold, seeds, step, sites, dropout);
  plan.set_bits(bits, true);
  plan.set_ds(ds);
  plan.set_dA(dA);
  plan.set_dx(dgate, gate);
  const ProducerRows& kernels = producer_rows(plan.call.x_type);
  const int64_t slots = plan.call.slots;
  const size_t row_bytes = static_cast<size_t>(D) * gate.element_size();
  make_rows(plan, for_first_positions(slots, [&, D, act, row_bytes](int64_t row) {
              kernels.gate(row_of(gate, row), row_of(up, row), D, act == 1, row_of(h, row));
              if (dgate) std::copy_n(row_of(dh, row), row_bytes, row_of(*dgate, row));
            }));
  run_backward_x(plan, gate);
  if (!dgate) return;
  make_rows(plan, for_first_positions(slots, [&, D, act](int64_t row) {
              kernels.gate_bwd(row_of(gate, row), row_of(up, row), D, act == 1, row_of(*dgate, row), row_of(*dup, row));
            }));
}

}  // namespace mtk::cpu
