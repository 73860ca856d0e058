#include "lora.h"

#include "../common/check.h"
#include "lora_run.h"

#include <algorithm>
#include <cstring>

namespace mtk::cpu {
namespace {

using Tensors = std::vector<Tensor>;

struct Plan {
  LoraCall call;
  std::vector<LoraAdapter> adapters;
  int64_t max_rank = 0;
};

RowMatrix row_matrix(const Tensor& t) { return {t.data_ptr(), t.stride(0)}; }

int64_t max_rank(const Tensors& A) {
  int64_t rank = 0;
  for (const Tensor& a : A) rank = std::max(rank, a.dim() == 2 ? a.size(0) : 0);
  return rank;
}

void check_factor(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
  check_dense(name, t, shape, {dtype});
}

// Everything shared by the two passes. x is [T, D]; the other side has O columns.
Plan make_plan(const Tensor& x, int64_t O, const Tensors& A, const Tensors& B, const Tensors& bias, const Tensor& scale,
               const Tensor& threshold, const Tensor& seeds, const Tensor& offsets, const Tensor& perm, const Tensor& step, int64_t site,
               bool dropout) {
  const int64_t n = static_cast<int64_t>(A.size()), T = x.size(0), D = x.size(1);
  STD_TORCH_CHECK(B.size() == A.size() && (bias.empty() || bias.size() == A.size()), "A, B and bias have ", A.size(), ", ", B.size(),
                  " and ", bias.size(), " entries; give one of each per adapter, or no bias at all");
  check_dense("scale", scale, {n}, {ScalarType::Float});
  check_dense("threshold", threshold, {n}, {ScalarType::Int});
  check_dense("seeds", seeds, {n}, {ScalarType::Long});
  check_dense("step", step, {}, {ScalarType::Long});
  check_plan(offsets, perm, n, T);
  const ScalarType dtype = n ? A[0].scalar_type() : x.scalar_type();
  Plan plan;
  LoraCall& call = plan.call;
  call = {};
  call.D = D;
  call.O = O;
  call.x_type = element_of(x.scalar_type());
  call.factor_type = element_of(dtype);
  call.s_type = call.x_type == call.factor_type ? call.x_type : Element::f32;
  call.x = row_matrix(x);
  call.site = static_cast<uint32_t>(site);
  call.step = static_cast<uint32_t>(*step.const_data_ptr<int64_t>());
  const int32_t* first = offsets.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < n; ++i) {
    LoraAdapter a = {};
    a.rank = A[i].dim() == 2 ? A[i].size(0) : 0;
    check_factor("A", A[i], dtype, {a.rank, D});
    check_factor("B", B[i], dtype, {O, a.rank});
    a.A = A[i].data_ptr();
    a.B = B[i].data_ptr();
    if (!bias.empty() && bias[i].numel() > 0) {
      check_factor("bias", bias[i], dtype, {O});
      a.bias = bias[i].data_ptr();
    }
    a.scale = scale.const_data_ptr<float>()[i];
    const int32_t limit = dropout ? threshold.const_data_ptr<int32_t>()[i] : 0;
    a.threshold = static_cast<uint32_t>(std::clamp(limit, 0, 65536));
    a.keep_factor = a.threshold == 65536 ? 0.f : 65536.f / static_cast<float>(65536 - a.threshold);
    a.seed = static_cast<uint64_t>(seeds.const_data_ptr<int64_t>()[i]);
    a.first_row = first[i];
    a.n_rows = first[i + 1] - first[i];
    a.rows = perm.const_data_ptr<int32_t>() + first[i];
    plan.max_rank = std::max(plan.max_rank, a.rank);
    plan.adapters.push_back(a);
  }
  return plan;
}

// The compute dtype: what A and x promote to.
ScalarType promote(const Tensor& x, const Tensors& A) {
  return A.empty() || A[0].scalar_type() == x.scalar_type() ? x.scalar_type() : ScalarType::Float;
}

int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Per column; the constants stand for moving a row and for packing the factors.
int64_t cost(const LoraAdapter& a, int64_t rows) { return (rows + 8) * (a.ranks() + 24); }

// Dear items first, so that threads finish together.
void sort_by_cost(std::vector<LoraItem>& items) {
  const auto weight = [](const LoraItem& item) { return cost(*item.adapter, item.row1 - item.row0) * (item.col1 - item.col0); };
  std::stable_sort(items.begin(), items.end(), [&](const LoraItem& a, const LoraItem& b) { return weight(a) > weight(b); });
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a group differ by at most one from another's: the cut depends on the adapter's own count only.
int64_t cut(int64_t n, int64_t parts, int64_t i) { return n / parts * i + std::min(i, n % parts); }

int64_t row_groups(const LoraAdapter& a) { return std::max<int64_t>(1, ceil_div(a.n_rows, kGroupRows)); }

// Whole blocks, at most `kMaxPieces` pieces of a row. Depends on the row length only: it fixes the order in which dS is summed.
constexpr int64_t kMaxPieces = 8;
int64_t piece_cols(int64_t cols) { return std::max<int64_t>(1, ceil_div(ceil_div(cols, kItemCols), kMaxPieces)) * kItemCols; }

int64_t total_cost(const std::vector<LoraAdapter>& adapters) {
  int64_t total = 0;
  for (const LoraAdapter& a : adapters) total += cost(a, a.n_rows);
  return total;
}

// Items over row groups and, where an adapter outweighs a thread's share, over pieces of its columns.
template <class Wanted>
std::vector<LoraItem> column_items(const std::vector<LoraAdapter>& adapters, int64_t cols, const Wanted& wanted) {
  std::vector<LoraItem> items;
  const int64_t piece = piece_cols(cols), pieces = ceil_div(cols, piece), share = total_cost(adapters) / (4 * num_threads()) + 1;
  for (const LoraAdapter& a : adapters) {
    if (!wanted(a)) continue;
    const int64_t groups = row_groups(a);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row0 = cut(a.n_rows, groups, g), row1 = cut(a.n_rows, groups, g + 1);
      const int64_t parts = num_threads() == 1 ? 1 : std::clamp<int64_t>(ceil_div(cost(a, row1 - row0), share), 1, std::max<int64_t>(1, pieces));
      const int64_t width = ceil_div(pieces, parts) * piece;
      for (int64_t col = 0; col < cols; col += width) items.push_back({&a, row0, row1, col, std::min(cols, col + width), g});
    }
  }
  sort_by_cost(items);
  return items;
}

// One item per column piece of every adapter whose gradient is in several partial sums; `group` holds their number.
std::vector<LoraItem> reduce_items(const std::vector<LoraAdapter>& adapters, int64_t cols) {
  std::vector<LoraItem> items;
  const int64_t piece = piece_cols(cols);
  for (const LoraAdapter& a : adapters)
    for (int64_t col = 0; row_groups(a) > 1 && col < cols; col += piece) items.push_back({&a, 0, 0, col, std::min(cols, col + piece), row_groups(a)});
  return items;
}

void run(const Plan& plan, const std::vector<LoraItem>& items, void (*kernel)(const LoraCall&, const LoraItem&, float*), int64_t rows) {
  run_items(static_cast<int64_t>(items.size()), lora_kernels().scratch(plan.max_rank, rows),
            [&](int64_t i, float* scratch) { kernel(plan.call, items[i], scratch); });
}

// Gives adapters room for partial gradients and for dS, all in one buffer.
Tensor take_buffers(Plan& plan, const Tensor& like) {
  const LoraCall& call = plan.call;
  const int64_t lanes = lora_kernels().lanes;
  const auto dS_floats = [&](const LoraAdapter& a) { return call.planes * a.n_rows * ceil_div(a.rank, lanes) * lanes; };
  int64_t total = 0;
  for (const LoraAdapter& a : plan.adapters) {
    total += dS_floats(a);
    if (row_groups(a) > 1 && call.need_factors) total += row_groups(a) * (a.rank * call.D + a.ranks() * call.O);
  }
  Tensor buffer = empty(like, {total}, ScalarType::Float);
  float* next = buffer.mutable_data_ptr<float>();
  for (LoraAdapter& a : plan.adapters) {
    a.dS = next;
    next += dS_floats(a);
    if (row_groups(a) == 1 || !call.need_factors) continue;
    a.partial_A = next;
    next += row_groups(a) * a.rank * call.D;
    a.partial_B = next;
    next += row_groups(a) * a.ranks() * call.O;
  }
  return buffer;
}

Tensors take_gradients(Plan& plan, const Tensors& A, const Tensors& B, const Tensors& bias) {
  Tensors grads;
  grads.reserve(A.size() * 3);
  const auto like = [&](const Tensor& t) {
    grads.push_back(torch::stable::empty_like(t));
    return grads.back().mutable_data_ptr();
  };
  for (size_t i = 0; i < A.size(); ++i) plan.adapters[i].dA = like(A[i]);
  for (size_t i = 0; i < B.size(); ++i) plan.adapters[i].dB = like(B[i]);
  for (size_t i = 0; i < bias.size(); ++i) plan.adapters[i].dbias = like(bias[i]);
  return grads;
}

}  // namespace

Tensor lora_fwd(Tensor x, std::vector<Tensor> A, std::vector<Tensor> B, std::vector<Tensor> bias, Tensor scale, Tensor threshold,
                Tensor seeds, Tensor offsets, Tensor perm, Tensor, Tensor step, int64_t site, bool dropout, Tensor y) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && y.scalar_type() == x.scalar_type(), "x is ", describe(x), " and y is ", describe(y),
                  "; give [T, D] and [T, O] of one dtype");
  const int64_t T = x.size(0), O = y.size(1);
  check_rows("x", x, T, x.size(1));
  check_rows("y", y, T, O);
  Plan plan = make_plan(x, O, A, B, bias, scale, threshold, seeds, offsets, perm, step, site, dropout);
  Tensor s = empty(x, {T, plan.max_rank}, promote(x, A));
  plan.call.y = row_matrix(y);
  plan.call.s = row_matrix(s);
  plan.call.s_cols = plan.max_rank;
  const int64_t grouped = offsets.const_data_ptr<int32_t>()[A.size()];
  const int64_t row_bytes = plan.max_rank * (plan.call.s_type == Element::f32 ? 4 : 2);
  if (row_bytes && grouped < T)
    std::memset(static_cast<char*>(s.mutable_data_ptr()) + grouped * row_bytes, 0, static_cast<size_t>((T - grouped) * row_bytes));

  const int64_t share = total_cost(plan.adapters) / (4 * num_threads()) + 1;
  std::vector<LoraItem> items;
  for (const LoraAdapter& a : plan.adapters) {
    const int64_t balanced = num_threads() == 1 ? 1 : std::min(ceil_div(cost(a, a.n_rows), share), ceil_div(a.n_rows, 24));
    const int64_t parts = std::max(balanced, ceil_div(a.n_rows, kForwardRows));
    for (int64_t p = 0; p < parts; ++p)
      if (a.n_rows) items.push_back({&a, cut(a.n_rows, parts, p), cut(a.n_rows, parts, p + 1), 0, O, 0});
  }
  sort_by_cost(items);
  run(plan, items, lora_kernels().forward, kForwardRows);
  return s;
}

std::vector<Tensor> lora_bwd(Tensor dy, Tensor x, Tensor s, std::vector<Tensor> A, std::vector<Tensor> B, std::vector<Tensor> bias,
                             Tensor scale, Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor, Tensor step, int64_t site,
                             bool dropout, std::optional<Tensor> dx, bool need_factors) {
  STD_TORCH_CHECK(x.dim() == 2 && dy.dim() == 2 && dy.scalar_type() == x.scalar_type(), "dy is ", describe(dy), " and x is ", describe(x),
                  "; give [T, O] and [T, D] of one dtype");
  const int64_t T = x.size(0), D = x.size(1), O = dy.size(1);
  check_rows("x", x, T, D);
  check_rows("dy", dy, T, O);
  check_dense("s", s, {T, max_rank(A)}, {promote(x, A)});
  if (dx) {
    STD_TORCH_CHECK(dx->scalar_type() == x.scalar_type(), "dx is ", describe(*dx), "; give it the dtype of x, ", dtype_name(x.scalar_type()));
    check_rows("dx", *dx, T, D);
  }
  Plan plan = make_plan(x, O, A, B, bias, scale, threshold, seeds, offsets, perm, step, site, dropout);
  LoraCall& call = plan.call;
  call.dy = row_matrix(dy);
  call.dx = dx ? row_matrix(*dx) : RowMatrix{nullptr, 0};
  call.s = row_matrix(s);
  call.s_cols = plan.max_rank;
  call.need_factors = need_factors;
  call.plane_cols = piece_cols(O);
  call.planes = ceil_div(O, call.plane_cols);
  Tensors grads = need_factors ? take_gradients(plan, A, B, bias) : Tensors{};
  const Tensor buffer = take_buffers(plan, x);

  const LoraKernels& kernels = lora_kernels();
  run(plan, column_items(plan.adapters, O, [&](const LoraAdapter& a) { return a.ranks() && (need_factors || a.n_rows); }), kernels.backward_dy, 0);
  if (need_factors || dx)
    run(plan, column_items(plan.adapters, D, [&](const LoraAdapter& a) { return a.rank && (need_factors || a.n_rows); }), kernels.backward_x, 0);
  if (need_factors) {
    run(plan, reduce_items(plan.adapters, D), kernels.reduce_A, 0);
    run(plan, reduce_items(plan.adapters, O), kernels.reduce_B, 0);
  }
  return grads;
}

}  // namespace mtk::cpu
