// Tensors in, a LoraCall out: checks, pointers, and the buffers one call needs.
#pragma once

#include "lora_items.h"

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace mtk::cpu {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// A call under construction; `call` points into the vectors beside it.
class LoraPlan {
 public:
  LoraPlan(int64_t n_targets, int64_t n_factors, int64_t n_rows, const Tensor& offsets, const Tensor& perm);
  LoraPlan(const LoraPlan&) = delete;

  // From here on the positions lie in `rows` rows, of x or of y, as many in each.
  void set_rows(int64_t rows);
  // A or B first; both must agree on the ranks.
  void set_A(const Tensors& A, const Tensor& x);
  void set_B(const Tensors& B, const Tensors& bias, const Tensors& scale, const OptionalTensor& gates, const Tensors& ys);
  void set_dropout(const Tensors& threshold, const Tensors& seeds, const Tensor& step, const Ints& sites, bool dropout);
  // Keep bits that the call fills, or reads in place of drawing the masks. After set_A.
  void set_bits(const OptionalTensor& bits, bool stored);
  void set_dx(const OptionalTensor& dx, const Tensor& x);
  void set_dA(const Tensors& dA);
  void set_dB(const Tensors& dB, const Tensors& dbias);
  void set_e(const OptionalTensor& e);
  void set_s(const Tensor& s);
  void set_ds(const Tensor& ds);

  // Fresh [positions, s_width()] of `dtype`.
  Tensor new_s(const Tensor& like, torch::headeronly::ScalarType dtype) const;
  int64_t s_width() const;
  // Exact zeros in rows of s (or ds) that no adapter owns.
  void zero_unowned(const RowMatrix& rows, Element type) const;
  // The largest sum over targets of an adapter's ranks.
  int64_t max_ranks() const;

  LoraCall call = {};
  std::vector<LoraGroup> groups;
  std::vector<LoraTarget> targets;
  std::vector<LoraAdapter> adapters;  // target by target
  int64_t n_rows, n_positions, n_owned;
  const int32_t* perm;

 private:
  int64_t index(int64_t target, int64_t group) const { return target * call.n_groups + group; }
  void set_rank(const char* name, LoraAdapter& a, const Tensor& factor, int64_t dim, int64_t other, torch::headeronly::ScalarType dtype);
  void place_s();
  void set_grad_type(const Tensors& grads);
  void zero_unused_bits(uint8_t* bits) const;

  bool has_ranks = false, has_grad_type = false;
};

// What x and the factors promote to.
torch::headeronly::ScalarType promoted(const Tensor& x, const Tensors& factors);

}  // namespace mtk::cpu
