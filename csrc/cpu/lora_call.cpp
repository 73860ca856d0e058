#include "lora_call.h"

#include "../common/check.h"
#include "lora_run.h"

#include <algorithm>
#include <cstring>

namespace mtk::cpu {
namespace {

RowMatrix row_matrix(const Tensor& t) { return {t.data_ptr(), t.stride(0)}; }

Factor factor_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

void check_count(const char* name, const Tensors& tensors, int64_t n, const char* per) {
  STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == n, "got ", tensors.size(), " of ", name, "; give one per ", per, ", ", n);
}

}  // namespace

ScalarType promoted(const Tensor& x, const Tensors& factors) {
  return factors.empty() || factors[0].scalar_type() == x.scalar_type() ? x.scalar_type() : ScalarType::Float;
}

LoraPlan::LoraPlan(int64_t n_targets, int64_t n_factors, int64_t rows, const Tensor& offsets, const Tensor& perm_tensor) {
  STD_TORCH_CHECK(n_targets > 0 && n_factors > 0 && n_factors % n_targets == 0, n_factors, " factors for ", n_targets,
                  " targets; give one per target and adapter, target by target, at least one");
  const int64_t n = n_factors / n_targets;
  n_positions = perm_tensor.numel();
  check_plan(offsets, perm_tensor, n, n_positions);
  set_rows(rows);
  const int32_t* bounds = offsets.const_data_ptr<int32_t>();
  perm = perm_tensor.const_data_ptr<int32_t>();
  n_owned = bounds[n];
  for (int64_t i = 0; i < n; ++i) groups.push_back({perm + bounds[i], bounds[i + 1] - bounds[i]});
  adapters.resize(static_cast<size_t>(n_factors));
  targets.resize(static_cast<size_t>(n_targets));
  for (int64_t g = 0; g < n_targets; ++g) targets[g].adapters = &adapters[g * n];
  call.n_groups = n;
  call.n_targets = n_targets;
  call.groups = groups.data();
  call.targets = targets.data();
}

void LoraPlan::set_rows(int64_t rows) {
  STD_TORCH_CHECK(rows ? n_positions && n_positions % rows == 0 : n_positions == 0, "perm has ", n_positions, " positions for ", rows,
                  " rows; give the same number, at least one, for each row");
  n_rows = rows;
  call.slots = rows ? n_positions / rows : 1;
}

void LoraPlan::set_rank(const char* name, LoraAdapter& a, const Tensor& factor, int64_t dim, int64_t other, ScalarType dtype) {
  STD_TORCH_CHECK(factor.dim() == 2 && factor.size(1 - dim) == other && factor.scalar_type() == dtype, name, " is ", describe(factor), "; give ",
                  dtype_name(dtype), dim ? " [" + std::to_string(other) + ", rank]" : " [rank, " + std::to_string(other) + "]");
  STD_TORCH_CHECK(!has_ranks || a.rank == factor.size(dim), name, " is ", describe(factor), ", but the other factor has rank ", a.rank);
  a.rank = factor.size(dim);
}

// Each target takes as many columns of s as its largest rank.
void LoraPlan::place_s() {
  int64_t col = 0;
  for (int64_t g = 0; g < call.n_targets; ++g) {
    targets[g].s_col = col;
    targets[g].s_cols = 0;
    for (int64_t i = 0; i < call.n_groups; ++i) targets[g].s_cols = std::max(targets[g].s_cols, adapters[index(g, i)].rank);
    col += targets[g].s_cols;
  }
  has_ranks = true;
}

void LoraPlan::set_A(const Tensors& A, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "x is ", describe(x), "; give [T, D]");
  check_rows("x", x, n_rows, x.size(1));
  check_count("A", A, static_cast<int64_t>(adapters.size()), "target and adapter");
  call.x_type = element_of(x.scalar_type());
  call.factor_type = element_of(A[0].scalar_type());
  call.x = row_matrix(x);
  call.D = x.size(1);
  for (size_t i = 0; i < A.size(); ++i) {
    set_rank("A", adapters[i], A[i], 0, call.D, A[0].scalar_type());
    check_rows("A", A[i], adapters[i].rank, call.D);
    adapters[i].A = factor_of(A[i]);
    adapters[i].keep_factor = 1.f;
  }
  if (!has_ranks) place_s();
}

void LoraPlan::set_B(const Tensors& B, const Tensors& bias, const Tensors& scale, const OptionalTensor& gates, const Tensors& ys) {
  const int64_t n = static_cast<int64_t>(adapters.size());
  check_count("B", B, n, "target and adapter");
  if (!bias.empty()) check_count("bias", bias, n, "target and adapter");
  check_count("scale", scale, call.n_targets, "target");
  check_count("y", ys, call.n_targets, "target");
  const ScalarType dtype = B[0].scalar_type();
  call.factor_type = element_of(dtype);
  call.y_type = element_of(ys[0].scalar_type());
  for (int64_t g = 0; g < call.n_targets; ++g) {
    const Tensor& y = ys[g];
    STD_TORCH_CHECK(y.dim() == 2 && y.scalar_type() == ys[0].scalar_type(), "y is ", describe(y), "; give [T, O], one dtype for all targets");
    check_rows("y", y, n_rows, y.size(1));
    check_dense("scale", scale[g], {call.n_groups}, {ScalarType::Float});
    targets[g].y = row_matrix(y);
    targets[g].O = y.size(1);
    for (int64_t i = 0; i < call.n_groups; ++i) {
      LoraAdapter& a = adapters[index(g, i)];
      set_rank("B", a, B[index(g, i)], 1, y.size(1), dtype);
      a.B = factor_of(B[index(g, i)]);
      a.scale = scale[g].const_data_ptr<float>()[i];
      if (bias.empty() || bias[index(g, i)].numel() == 0) continue;
      check_dense("bias", bias[index(g, i)], {y.size(1)}, {dtype});
      a.bias = bias[index(g, i)].data_ptr();
    }
  }
  if (gates) {
    check_dense("gates", *gates, {n_positions}, {ScalarType::Float});
    call.gates = gates->const_data_ptr<float>();
  }
  if (!has_ranks) place_s();
}

void LoraPlan::set_dropout(const Tensors& threshold, const Tensors& seeds, const Tensor& step, const Ints& sites, bool dropout) {
  check_count("threshold", threshold, call.n_targets, "target");
  check_count("seeds", seeds, call.n_targets, "target");
  STD_TORCH_CHECK(static_cast<int64_t>(sites.size()) == call.n_targets, "got ", sites.size(), " sites for ", call.n_targets, " targets");
  check_dense("step", step, {}, {ScalarType::Long});
  call.step = static_cast<uint32_t>(*step.const_data_ptr<int64_t>());
  for (int64_t g = 0; g < call.n_targets; ++g) {
    check_dense("threshold", threshold[g], {call.n_groups}, {ScalarType::Int});
    check_dense("seeds", seeds[g], {call.n_groups}, {ScalarType::Long});
    targets[g].site = static_cast<uint32_t>(sites[g]);
    for (int64_t i = 0; i < call.n_groups; ++i) {
      LoraAdapter& a = adapters[index(g, i)];
      a.threshold = static_cast<uint32_t>(std::clamp(dropout ? threshold[g].const_data_ptr<int32_t>()[i] : 0, 0, 65536));
      a.keep_factor = a.threshold == 65536 ? 0.f : 65536.f / static_cast<float>(65536 - a.threshold);
      a.seed = static_cast<uint64_t>(seeds[g].const_data_ptr<int64_t>()[i]);
    }
  }
}

void LoraPlan::set_bits(const OptionalTensor& bits, bool stored) {
  if (!bits) return;
  call.bits_cols = (call.D + 7) / 8;
  check_dense("bits", *bits, {n_positions, call.n_targets, call.bits_cols}, {ScalarType::Byte});
  uint8_t* data = static_cast<uint8_t*>(bits->data_ptr());
  if (stored) {
    call.stored_bits = data;
  } else {
    call.filled_bits = data;
    zero_unused_bits(data);
  }
}

// Where no adapter is, or one of rank 0, whose mask no kernel draws.
void LoraPlan::zero_unused_bits(uint8_t* bits) const {
  const auto zero = [&](int32_t position, int64_t target, int64_t n) {
    std::memset(bits + (position * call.n_targets + target) * call.bits_cols, 0, static_cast<size_t>(n * call.bits_cols));
  };
  for (int64_t j = n_owned; j < n_positions; ++j) zero(perm[j], 0, call.n_targets);
  for (int64_t g = 0; g < call.n_targets; ++g)
    for (int64_t i = 0; i < call.n_groups; ++i)
      for (int64_t j = 0; adapters[index(g, i)].rank == 0 && j < groups[i].n; ++j) zero(groups[i].positions[j], g, 1);
}

void LoraPlan::set_dx(const OptionalTensor& dx, const Tensor& x) {
  if (!dx) return;
  STD_TORCH_CHECK(dx->scalar_type() == x.scalar_type(), "dx is ", describe(*dx), "; give it the dtype of x, ", dtype_name(x.scalar_type()));
  check_rows("dx", *dx, n_rows, call.D);
  call.dx = row_matrix(*dx);
}

void LoraPlan::set_grad_type(const Tensors& grads) {
  for (const Tensor& grad : grads) {
    if (grad.numel() == 0) continue;
    const Element type = element_of(grad.scalar_type());
    STD_TORCH_CHECK(!has_grad_type || type == call.grad_type, "gradients have several dtypes, one of them ", describe(grad), "; give one");
    call.grad_type = type;
    has_grad_type = true;
  }
}

void LoraPlan::set_dA(const Tensors& dA) {
  check_count("dA", dA, static_cast<int64_t>(adapters.size()), "target and adapter, empty where unwanted");
  set_grad_type(dA);
  for (size_t i = 0; i < dA.size(); ++i) {
    if (dA[i].numel() == 0) continue;
    check_rows("dA", dA[i], adapters[i].rank, call.D);
    adapters[i].dA = factor_of(dA[i]);
  }
}

void LoraPlan::set_dB(const Tensors& dB, const Tensors& dbias) {
  const int64_t n = static_cast<int64_t>(adapters.size());
  check_count("dB", dB, n, "target and adapter, empty where unwanted");
  if (!dbias.empty()) check_count("dbias", dbias, n, "target and adapter, empty where unwanted");
  set_grad_type(dB);
  set_grad_type(dbias);
  for (int64_t i = 0; i < n; ++i) {
    LoraAdapter& a = adapters[i];
    const int64_t O = targets[i / call.n_groups].O;
    if (dB[i].numel()) {
      STD_TORCH_CHECK(has_shape(dB[i], {O, a.rank}), "dB is ", describe(dB[i]), "; give [", O, ", ", a.rank, "], or an empty tensor");
      a.dB = factor_of(dB[i]);
    }
    if (dbias.empty() || dbias[i].numel() == 0) continue;
    STD_TORCH_CHECK(a.bias, "dbias is ", describe(dbias[i]), ", but the adapter has no bias; give an empty tensor");
    check_dense("dbias", dbias[i], {O}, {dbias[i].scalar_type()});
    a.dbias = dbias[i].data_ptr();
  }
}

void LoraPlan::set_e(const OptionalTensor& e) {
  if (!e) return;
  check_dense("e", *e, {call.n_targets, n_positions}, {ScalarType::Float});
  for (int64_t g = 0; g < call.n_targets; ++g) {
    targets[g].e = static_cast<float*>(e->data_ptr()) + g * n_positions;
    for (int64_t j = n_owned; j < n_positions; ++j) targets[g].e[perm[j]] = 0.f;
  }
}

void LoraPlan::set_s(const Tensor& s) {
  check_rows("s", s, n_positions, s_width());
  call.s_type = element_of(s.scalar_type());
  call.s = row_matrix(s);
}

void LoraPlan::set_ds(const Tensor& ds) {
  check_rows("ds", ds, n_positions, s_width());
  call.ds_type = element_of(ds.scalar_type());
  call.ds = row_matrix(ds);
}

int64_t LoraPlan::s_width() const { return targets.back().s_col + targets.back().s_cols; }

Tensor LoraPlan::new_s(const Tensor& like, ScalarType dtype) const { return empty(like, {n_positions, s_width()}, dtype); }

void LoraPlan::zero_unowned(const RowMatrix& rows, Element type) const {
  const int64_t size = type == Element::f32 ? 4 : 2, bytes = s_width() * size;
  for (int64_t j = n_owned; bytes && j < n_positions; ++j)
    std::memset(static_cast<char*>(rows.data) + perm[j] * rows.stride * size, 0, static_cast<size_t>(bytes));
}

int64_t LoraPlan::max_ranks() const {
  int64_t most = 0;
  for (int64_t i = 0; i < call.n_groups; ++i) {
    int64_t sum = 0;
    for (int64_t g = 0; g < call.n_targets; ++g) sum += adapters[index(g, i)].ranks();
    most = std::max(most, sum);
  }
  return most;
}

}  // namespace mtk::cpu
