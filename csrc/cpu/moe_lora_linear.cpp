#include "../common/check.h"
#include "lora.h"
#include "lora_run.h"
#include "lora_work.h"

#include <algorithm>
#include <cstring>

namespace mtk::cpu {
namespace {

// Floats of the positions' float32 results that are held at a time, where they are not the result itself.
constexpr int64_t kHeldFloats = 1 << 22;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Block {
  int64_t col0, col1;
};

// A vector over the adapters with a zero behind each expert's, for the adapter of rank 0 there.
Tensor with_none(const char* name, const Tensor& v, int64_t experts, int64_t groups) {
  STD_TORCH_CHECK(v.dim() == 1 && v.size(0) == groups - experts, name, " is ", describe(v), "; give one per adapter, ", groups - experts);
  Tensor padded = empty(v, {groups}, v.scalar_type());
  const size_t size = v.element_size();
  const int64_t n = groups / experts;
  const char* from = static_cast<const char*>(v.const_data_ptr());
  char* to = static_cast<char*>(padded.mutable_data_ptr());
  std::memset(to, 0, static_cast<size_t>(groups) * size);
  for (int64_t g = 0, i = 0; g < groups; ++g)
    if (g % n != n - 1) std::memcpy(to + static_cast<size_t>(g) * size, from + static_cast<size_t>(i++ * v.stride(0)) * size, size);
  return padded;
}

// Position, or row of several positions, of every place in the plan's order.
std::vector<int32_t> rows_of(const LoraPlan& plan, int64_t rows) {
  const int64_t slots = rows ? plan.n_positions / rows : 1;
  std::vector<int32_t> found(plan.perm, plan.perm + plan.n_owned);
  for (int32_t& row : found) row = static_cast<int32_t>(row / slots);
  return found;
}

const void* of_expert(const Tensor& t, size_t e) {
  return static_cast<const char*>(t.data_ptr()) + static_cast<int64_t>(e) * t.stride(0) * static_cast<int64_t>(t.element_size());
}

// One product per expert, of the rows of its positions: by W_e^T or by W_e, or by b_e.
class Experts {
 public:
  Experts(const LoraPlan& plan, const Tensor& rows, const Tensor& weight)
      : starts_(static_cast<size_t>(weight.size(0)) + 1), from_(rows_of(plan, rows.size(0))), rows_{rows.data_ptr(), rows.stride(0)}, perm_(plan.perm) {
    const size_t n = plan.groups.size() / static_cast<size_t>(weight.size(0));
    for (size_t e = 0; e + 1 < starts_.size(); ++e) starts_[e] = plan.groups[e * n].positions - plan.perm;
    starts_.back() = plan.n_owned;
    parts_.resize(starts_.size() - 1);
    shared_.type = element_of(weight.scalar_type());
    shared_.y_type = Element::f32;
    shared_.n_parts = 1;
  }

  // w(k, n) of expert e at w + e * stride, k * k_stride, n * n_stride elements.
  void multiply_by(const Tensor& w, int64_t k_stride, int64_t n_stride, int64_t K, int64_t N) {
    STD_TORCH_CHECK(k_stride == 1 || n_stride == 1, "weight is ", describe(w), "; give it unit stride in one of the last two dimensions");
    for (size_t e = 0; e < parts_.size(); ++e) parts_[e] = {rows_.data, of_expert(w, e), rows_.stride, k_stride, n_stride, K};
    shared_.N = N;
  }

  void add(const Tensor& bias) {
    for (size_t e = 0; e < parts_.size(); ++e) bias_.push_back(of_expert(bias, e));
  }
  void scale_by(const float* gates) { shared_.gates = gates; }

  void dot_with(const Tensor& z, const LoraPlan& plan, float* dots) {
    z_rows_ = rows_of(plan, z.size(0));
    shared_.z = z.data_ptr(), shared_.z_stride = z.stride(0);
    shared_.dots = dots, shared_.dots_stride = plan.n_positions;
  }

  // Columns of the block, one row of y per position.
  void run(float* y, int64_t y_stride, Block block) const {
    struct Item {
      size_t expert;
      int64_t row0, row1, col0, col1;
    };
    std::vector<Item> items;
    std::vector<BaseCall> calls(parts_.size(), shared_);
    for (size_t e = 0; e < parts_.size(); ++e) {
      BaseCall& call = calls[e];
      const int64_t at = starts_[e], M = call.M = starts_[e + 1] - at;
      call.parts = &parts_[e];
      call.bias = bias_.empty() ? nullptr : bias_[e];
      call.y = y, call.y_stride = y_stride, call.y_col = block.col0;
      call.x_rows = from_.data() + at, call.y_rows = perm_ + at;
      call.z_rows = z_rows_.empty() ? nullptr : z_rows_.data() + at;
      const int64_t rows = M ? ceil_div(ceil_div(M, ceil_div(M, kBaseRows)), 12) * 12 : 1;
      for (int64_t col = block.col0; col < block.col1; col += kBaseCols)
        for (int64_t row = 0; row < M; row += rows)
          items.push_back({e, row, std::min(M, row + rows), col, std::min(block.col1, col + kBaseCols)});
    }
    const BaseKernels& kernels = base_kernels(shared_.type);
    run_items(static_cast<int64_t>(items.size()), kernels.scratch(), [&](int64_t i, float* scratch) {
      const Item& item = items[static_cast<size_t>(i)];
      kernels.tile(calls[item.expert], item.row0, item.row1, item.col0, item.col1, scratch);
    });
  }

 private:
  std::vector<int64_t> starts_;
  std::vector<int32_t> from_, z_rows_;
  std::vector<BasePart> parts_;
  BaseCall shared_ = {};
  RowMatrix rows_;
  const int32_t* perm_;
  std::vector<const void*> bias_;
};

// make(z, stride, block) writes the owned positions' rows of a block of the N columns in float32; then y [rows, N], if given, is their sum
// over each row's positions.
template <class Make>
void sum_positions(const LoraPlan& plan, const Tensor& like, int64_t N, OptionalTensor y, const Make& make) {
  const int64_t P = plan.n_positions, rows = y ? y->size(0) : 0, slots = rows ? P / rows : 1;
  const bool direct = y && slots == 1 && y->scalar_type() == ScalarType::Float;
  if (P == 0 || N == 0) return;
  const int64_t held = std::max<int64_t>(1, kHeldFloats / P / kBaseCols) * kBaseCols, width = direct ? N : std::min(N, held);
  Tensor own = direct ? *y : empty(like, {P, width}, ScalarType::Float);
  float* z = own.mutable_data_ptr<float>();
  for (int64_t col = 0; col < N; col += width) {
    const Block block = {col, std::min(N, col + width)};
    const int64_t n = block.col1 - block.col0;
    for (int64_t j = plan.n_owned; j < P; ++j) std::memset(z + plan.perm[j] * width, 0, static_cast<size_t>(n) * sizeof(float));
    make(z, width, block);
    if (direct || !y) continue;
    constexpr int64_t kSumRows = 16;
    run_items(ceil_div(rows, kSumRows), 0, [&](int64_t i, float*) {
      for (int64_t t = i * kSumRows; t < std::min(rows, (i + 1) * kSumRows); ++t) {
        char* to = static_cast<char*>(y->mutable_data_ptr()) + (t * N + col) * static_cast<int64_t>(y->element_size());
        lora_kernels().sum_rows(z + t * slots * width, width, slots, n, element_of(y->scalar_type()), to);
      }
    });
  }
}

// For items that count columns from the first of all; the block's first lies at z.
RowMatrix block_at(float* z, int64_t stride, Block block) { return {z - block.col0, stride}; }

void check_experts(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensors& A, const OptionalTensor& gates, int64_t positions) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) && weight.scalar_type() == dtype, "weight is ", describe(weight), "; give [E, O, D] of ",
                  dtype_name(dtype));
  const int64_t E = weight.size(0), groups = static_cast<int64_t>(A.size());
  STD_TORCH_CHECK(groups > E && groups % E == 0, groups, " of A for ", E, " experts; give each as many adapters, and one of rank 0");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == weight.size(2), "x is ", describe(x), ", weight ", describe(weight), "; give x [rows, D]");
  if (bias) {
    check_rows("bias", *bias, E, weight.size(1));
    STD_TORCH_CHECK(bias->scalar_type() == dtype, "bias is ", describe(*bias), "; give it the dtype of x, ", dtype_name(dtype));
  }
  if (gates) {
    STD_TORCH_CHECK(gates->dim() == 2 && gates->numel() == positions, "gates is ", describe(*gates), "; give [T, K], one per position, ", positions);
    check_dense("gates", *gates, {gates->size(0), gates->size(1)}, {ScalarType::Float});
  }
}

const float* gates_of(const OptionalTensor& gates) { return gates ? gates->const_data_ptr<float>() : nullptr; }

// gates' gradient: the parts of each position, its product with the bias and the adapter's e.
void sum_gate_grad(const LoraPlan& plan, const Tensor& dots, const float* by_bias, const float* e, float* dgates) {
  for (int64_t j = plan.n_owned; j < plan.n_positions; ++j) dgates[plan.perm[j]] = 0.f;
  const float* parts = dots.const_data_ptr<float>();
  for (size_t g = 0; g < plan.groups.size(); ++g)
    for (int64_t j = 0; j < plan.groups[g].n; ++j) {
      const int64_t p = plan.groups[g].positions[j];
      float sum = 0.f;
      for (int64_t c = 0; c < dots.size(0); ++c) sum += parts[c * plan.n_positions + p];
      if (by_bias) sum += by_bias[p];
      dgates[p] = sum + plan.adapters[g].scale * e[p];
    }
}

}  // namespace

std::tuple<Tensor, Tensor> moe_lora_linear_fwd(Tensor x, Tensor weight, OptionalTensor bias, Tensors A, Tensors B, Tensors lora_bias, Tensor scale,
                                               Tensor threshold, Tensor seeds, OptionalTensor gates, Tensor offsets, Tensor perm, Tensor,
                                               Tensor step, int64_t site, bool dropout, OptionalTensor bits) {
  check_experts(x, weight, bias, A, gates, perm.numel());
  const int64_t E = weight.size(0), O = weight.size(1), G = static_cast<int64_t>(A.size());
  LoraPlan plan(1, G, x.size(0), offsets, perm);
  plan.set_A(A, x);
  plan.set_dropout({with_none("threshold", threshold, E, G)}, {with_none("seeds", seeds, E, G)}, step, {site}, dropout);
  plan.set_bits(bits, false);
  Tensor s = plan.new_s(x, promoted(x, A)), y = empty(x, {gates ? gates->size(0) : perm.numel(), O}, x.scalar_type());
  plan.set_rows(y.size(0));
  plan.set_B(B, lora_bias, {with_none("scale", scale, E, G)}, std::nullopt, {y});
  plan.set_s(s);
  plan.zero_unowned(plan.call.s, plan.call.s_type);
  plan.set_rows(x.size(0));
  run_shrink(plan);

  Experts experts(plan, x, weight);
  experts.multiply_by(weight, weight.stride(2), weight.stride(1), weight.size(2), O);
  if (bias) experts.add(*bias);
  experts.scale_by(gates_of(gates));
  plan.call.gates = gates_of(gates);
  plan.set_rows(plan.n_positions);
  plan.call.y_type = Element::f32;
  sum_positions(plan, x, O, y, [&](float* z, int64_t stride, Block block) {
    experts.run(z, stride, block);
    plan.targets[0].y = block_at(z, stride, block);
    run_expand(plan, block.col0, block.col1);
  });
  return {y, s};
}

void moe_lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, OptionalTensor bias, Tensor s, Tensors A, Tensors B, Tensors lora_bias, Tensor scale,
                         Tensor threshold, Tensor seeds, OptionalTensor gates, Tensor offsets, Tensor perm, Tensor, Tensor step, int64_t site,
                         bool dropout, OptionalTensor dx, OptionalTensor dgates, OptionalTensor e, Tensors dA, Tensors dB, Tensors dbias,
                         OptionalTensor bits) {
  check_experts(x, weight, bias, A, gates, perm.numel());
  STD_TORCH_CHECK(!dgates || (gates && e), "dgates is given without gates or e; give both");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy is ", describe(dy), "; give it the dtype of x, ", dtype_name(x.scalar_type()));
  if (dx) check_dense("dx", *dx, {x.size(0), x.size(1)}, {x.scalar_type()});
  const int64_t E = weight.size(0), O = weight.size(1), D = weight.size(2), G = static_cast<int64_t>(A.size());
  LoraPlan plan(1, G, x.size(0), offsets, perm);
  plan.set_A(A, x);
  plan.set_dropout({with_none("threshold", threshold, E, G)}, {with_none("seeds", seeds, E, G)}, step, {site}, dropout);
  plan.set_bits(bits, true);
  plan.set_rows(dy.size(0));
  plan.set_B(B, lora_bias, {with_none("scale", scale, E, G)}, std::nullopt, {dy});
  plan.call.gates = gates_of(gates);
  plan.set_s(s);
  plan.set_e(e);
  plan.set_dA(dA);
  plan.set_dB(dB, dbias);
  for (LoraAdapter& a : plan.adapters) a.needs_d = dx || e || a.dA.data;
  const Tensor ds = plan.new_s(x, ScalarType::Float);  // not rounded between the two halves
  plan.set_ds(ds);
  run_backward_y(plan, x);
  plan.set_rows(x.size(0));
  run_backward_x(plan, x);
  if (!dx && !dgates) return;

  Experts experts(plan, dy, weight);
  const Tensor dots = empty(x, {ceil_div(D, kBaseCols), plan.n_positions}, ScalarType::Float);
  const Tensor by_bias = empty(x, {plan.n_positions}, ScalarType::Float);
  if (dgates && bias) {
    experts.multiply_by(*bias, 1, O, O, 1);
    experts.run(static_cast<float*>(by_bias.data_ptr()), 1, {0, 1});
  }
  if (dgates) experts.dot_with(x, plan, static_cast<float*>(dots.data_ptr()));
  experts.multiply_by(weight, weight.stride(1), weight.stride(2), O, D);
  experts.scale_by(plan.call.gates);
  plan.set_rows(plan.n_positions);
  plan.call.x_type = Element::f32;  // of dx: x is not read again
  for (LoraAdapter& a : plan.adapters) a.dA.data = nullptr;
  sum_positions(plan, x, D, dx, [&](float* z, int64_t stride, Block block) {
    experts.run(z, stride, block);
    plan.call.dx = block_at(z, stride, block);
    if (dx) run_dx(plan, block.col0, block.col1);
  });
  if (!dgates) return;
  check_dense("dgates", *dgates, {gates->size(0), gates->size(1)}, {ScalarType::Float});
  sum_gate_grad(plan, dots, bias ? by_bias.const_data_ptr<float>() : nullptr, e->const_data_ptr<float>(), dgates->mutable_data_ptr<float>());
}

}  // namespace mtk::cpu
