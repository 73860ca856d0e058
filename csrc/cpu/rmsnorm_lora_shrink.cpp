#include "../common/check.h"
#include "lora.h"
#include "lora_run.h"
#include "lora_work.h"
#include "producer_rows.h"

#include <algorithm>

namespace mtk::cpu {
namespace {

// Rows whose dgamma is summed in one go: fixed, because it fixes the order of the sum.
constexpr int64_t kGammaRows = 256;

std::vector<float> weights(const Tensor& gamma, int64_t D, double offset) {
  check_dense("gamma", gamma, {D}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  std::vector<float> w(static_cast<size_t>(D));
  dispatch_floating(gamma.scalar_type(), [&](auto element) {
    const auto* p = gamma.const_data_ptr<decltype(element)>();
    for (int64_t k = 0; k < D; ++k) w[k] = static_cast<float>(offset) + static_cast<float>(p[k]);
  });
  return w;
}

// Row addresses of a [T, D] matrix.
struct Rows {
  char* data;
  int64_t stride;
  explicit Rows(const Tensor& t) : data(static_cast<char*>(t.data_ptr())), stride(t.stride(0) * static_cast<int64_t>(t.element_size())) {}
  void* operator[](int64_t row) const { return data + row * stride; }
};

void store_gamma(const std::vector<float>& sums, int64_t parts, Tensor& dgamma) {
  const int64_t D = dgamma.numel();
  dispatch_floating(dgamma.scalar_type(), [&](auto element) {
    auto* out = dgamma.mutable_data_ptr<decltype(element)>();
    for (int64_t k = 0; k < D; ++k) {
      double sum = 0;
      for (int64_t p = 0; p < parts; ++p) sum += sums[p * D + k];
      out[k] = static_cast<decltype(element)>(static_cast<float>(sum));
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> rmsnorm_lora_shrink_fwd(Tensor x, Tensor gamma, double eps, double offset, bool round_first, Tensors A,
                                                           Tensors threshold, Tensors seeds, Tensor offsets, Tensor perm, Tensor, Tensor step,
                                                           Ints sites, bool dropout, OptionalTensor bits) {
  STD_TORCH_CHECK(x.dim() == 2, "x is ", describe(x), "; give [T, D]");
  const int64_t T = x.size(0), D = x.size(1);
  check_rows("x", x, T, D);
  const std::vector<float> w = weights(gamma, D, offset);
  Tensor xn = empty(x, {T, D}, x.scalar_type()), rstd = empty(x, {T}, ScalarType::Float);
  LoraPlan plan(static_cast<int64_t>(sites.size()), static_cast<int64_t>(A.size()), T, offsets, perm);
  plan.set_A(A, xn);
  plan.set_dropout(threshold, seeds, step, sites, dropout);
  plan.set_bits(bits, false);
  Tensor s = plan.new_s(x, promoted(x, A));
  plan.set_s(s);
  plan.zero_unowned(plan.call.s, plan.call.s_type);
  const ProducerRows& kernels = producer_rows(plan.call.x_type);
  const Rows from(x), to(xn);
  float* r = rstd.mutable_data_ptr<float>();
  const int64_t slots = plan.call.slots;
  run_shrink(plan, [&](const int32_t* positions, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = positions[i] / slots;
      if (positions[i] % slots == 0) r[row] = kernels.rmsnorm(from[row], w.data(), D, static_cast<float>(eps), round_first, to[row]);
    }
  });
  return {xn, s, rstd};
}

void rmsnorm_lora_shrink_bwd(Tensor dxn, Tensor ds, Tensor x, Tensor gamma, Tensor rstd, Tensor, double offset, bool round_first, Tensors A,
                             Tensors threshold, Tensors seeds, Tensor offsets, Tensor perm, Tensor, Tensor step, Ints sites, bool dropout,
                             OptionalTensor dx, OptionalTensor dgamma, Tensors dA, OptionalTensor bits) {
  STD_TORCH_CHECK(x.dim() == 2 && dxn.scalar_type() == x.scalar_type(), "x is ", describe(x), " and dxn is ", describe(dxn),
                  "; give [T, D] of one dtype");
  const int64_t T = x.size(0), D = x.size(1);
  check_rows("x", x, T, D);
  check_rows("dxn", dxn, T, D);
  check_dense("rstd", rstd, {T}, {ScalarType::Float});
  const std::vector<float> w = weights(gamma, D, offset);
  const float* r = rstd.const_data_ptr<float>();
  LoraPlan plan(static_cast<int64_t>(sites.size()), static_cast<int64_t>(A.size()), T, offsets, perm);
  Tensor xn = empty(x, {T, D}, x.scalar_type());
  plan.set_A(A, xn);
  plan.set_dropout(threshold, seeds, step, sites, dropout);
  plan.set_bits(bits, true);
  plan.set_ds(ds);
  plan.set_dA(dA);
  const bool rows_wanted = dx || dgamma;
  Tensor total = dx ? *dx : rows_wanted ? empty(x, {T, D}, x.scalar_type()) : x;
  if (rows_wanted) plan.set_dx(total, x);
  const ProducerRows& kernels = producer_rows(plan.call.x_type);
  const Rows from(x), made(xn), given(dxn), into(total);
  const size_t row_bytes = static_cast<size_t>(D) * x.element_size();
  make_rows(plan, [&](const int32_t* positions, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = positions[i] / plan.call.slots;
      if (positions[i] % plan.call.slots) continue;
      kernels.normalize(from[row], w.data(), D, r[row], round_first, made[row]);
      if (rows_wanted) std::copy_n(static_cast<char*>(given[row]), row_bytes, static_cast<char*>(into[row]));
    }
  });
  run_backward_x(plan, x);
  if (!rows_wanted) return;
  const int64_t parts = (T + kGammaRows - 1) / kGammaRows;
  std::vector<float> sums(static_cast<size_t>(dgamma ? parts * D : 0));
  run_items(parts, 0, [&](int64_t p, float*) {
    for (int64_t row = p * kGammaRows; row < std::min(T, (p + 1) * kGammaRows); ++row)
      kernels.rmsnorm_bwd(from[row], w.data(), D, r[row], round_first, !dx, into[row], dgamma ? sums.data() + p * D : nullptr);
  });
  if (dgamma) store_gamma(sums, parts, *dgamma);
}

}  // namespace mtk::cpu
