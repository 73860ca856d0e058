#include "../common/check.h"
#include "../mtkernels.h"
#include "isa.h"
#include "task_cross_entropy_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mtk::cpu {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kGrainElements = 32768;
constexpr int64_t kFewClasses = 512;

const CrossEntropyRows& rows_of(ScalarType dtype) {
  const CrossEntropyRows* table = cross_entropy_generic;
#ifdef __x86_64__
  if (isa() == Isa::avx2) table = cross_entropy_avx2;
  if (isa() == Isa::avx512) table = cross_entropy_avx512;
#endif
  return table[dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2];
}

enum class Kind { skipped, known, unknown };  // unknown: the target is no class

struct RowLoss {
  float nll, lse;
};

template <class T, class Index>
struct Rows {
  const T* logits;
  int64_t n_classes, stride;
  const Index* target;
  const int32_t* ids;
  int64_t ignore_index;
  const CrossEntropyRows& kernels;

  const T* row(int64_t t) const { return logits + t * stride; }

  T* as_elements(void* p) const { return static_cast<T*>(p); }

  Kind kind(int64_t t) const {
    if (ids[t] < 0 || target[t] == ignore_index) return Kind::skipped;
    return target[t] >= 0 && target[t] < n_classes ? Kind::known : Kind::unknown;
  }

  RowLoss loss(int64_t t) const {
    const Kind kind = this->kind(t);
    if (kind == Kind::skipped) return {0.0f, 0.0f};
    const float top = kernels.max(row(t), n_classes);
    // As torch.logsumexp: an infinite maximum is the result itself, unless there is a NaN.
    const bool infinite = std::isinf(top);
    const float shift = infinite ? 0.0f : top;
    const float sum = kernels.sum_exp(row(t), n_classes, shift, row(t + 1));
    const float log_sum = std::log(sum);
    const float lse = infinite && !std::isnan(sum) ? top : shift + log_sum;
    if (kind == Kind::unknown) return {kNaN, lse};
    const float z = static_cast<float>(row(t)[target[t]]);
    // shift - z is exact where the target dominates; lse - z would round first.
    return {infinite ? lse - z : (shift - z) + log_sum, lse};
  }

  void gradient(int64_t t, float lse, float dnll, T* dx) const {
    const Kind kind = this->kind(t);
    if (kind != Kind::known) {
      std::fill_n(dx, n_classes, static_cast<T>(kind == Kind::skipped ? 0.0f : kNaN));
      return;
    }
    // Over few classes the rounding of lse is the largest error; dividing by the sum it leaves removes it.
    const bool rescale = n_classes <= kFewClasses && std::isfinite(lse);
    const float sum = rescale ? kernels.sum_exp(row(t), n_classes, lse, row(t + 1)) : 1.0f;
    kernels.softmax(row(t), n_classes, lse, dnll / sum, dx, row(t + 1));
    const int64_t y = target[t];
    const float less_one = (std::expm1(static_cast<float>(row(t)[y]) - lse) - (sum - 1.0f)) / sum;
    dx[y] = static_cast<T>(dnll * less_one);
  }
};

void check_logits(const Tensor& logits) {
  check_floating("logits", logits);
  STD_TORCH_CHECK(logits.dim() == 2, "logits is ", describe(logits), "; give [tokens, classes]");
}

// Calls f(rows, first, last) over slices of the rows; a row's result does not depend on the slicing.
template <class F>
void for_rows(const Tensor& logits, const Tensor& target, const Tensor& ids, int64_t ignore_index, const F& f) {
  const int64_t n_rows = logits.size(0), n_classes = logits.size(1);
  check_rows("logits", logits, n_rows, n_classes);
  check_dense("target", target, {n_rows}, {ScalarType::Int, ScalarType::Long});
  check_dense("ids", ids, {n_rows}, {ScalarType::Int});

  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, n_classes));
  dispatch_index(target.scalar_type(), [&](auto index) {
    dispatch_floating(logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using Index = decltype(index);
      const Rows<T, Index> rows{logits.const_data_ptr<T>(),  n_classes,    logits.stride(0),
                                target.const_data_ptr<Index>(), ids.const_data_ptr<int32_t>(),
                                ignore_index,                rows_of(logits.scalar_type())};
      torch::stable::parallel_for(0, n_rows, grain, [&](int64_t first, int64_t last) { f(rows, first, last); });
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensor> task_cross_entropy_fwd(Tensor logits, Tensor target, Tensor ids, int64_t ignore_index) {
  check_logits(logits);
  Tensor nll = empty(logits, {logits.size(0)}, ScalarType::Float);
  Tensor lse = empty(logits, {logits.size(0)}, ScalarType::Float);
  float* nll_p = nll.mutable_data_ptr<float>();
  float* lse_p = lse.mutable_data_ptr<float>();
  for_rows(logits, target, ids, ignore_index, [&](const auto& rows, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const RowLoss loss = rows.loss(t);
      nll_p[t] = loss.nll;
      lse_p[t] = loss.lse;
    }
  });
  return {nll, lse};
}

Tensor task_cross_entropy_bwd(Tensor dnll, Tensor logits, Tensor target, Tensor ids, Tensor lse, int64_t ignore_index) {
  check_logits(logits);
  check_dense("dnll", dnll, {logits.size(0)}, {ScalarType::Float});
  check_dense("lse", lse, {logits.size(0)}, {ScalarType::Float});
  Tensor dlogits = empty(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  const float* dnll_p = dnll.const_data_ptr<float>();
  const float* lse_p = lse.const_data_ptr<float>();
  void* dlogits_p = dlogits.mutable_data_ptr();
  for_rows(logits, target, ids, ignore_index, [&](const auto& rows, int64_t first, int64_t last) {
    auto* dx = rows.as_elements(dlogits_p);
    for (int64_t t = first; t < last; ++t) rows.gradient(t, lse_p[t], dnll_p[t], dx + t * rows.n_classes);
  });
  return dlogits;
}

}  // namespace mtk::cpu
