// Argument checks and small tensor helpers shared by every entry point.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace mtk {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Byte: return "uint8";
    default: return "dtype #" + std::to_string(static_cast<int>(dtype));
  }
}

// "float32 [4, 16], strides [16, 1]"
inline std::string describe(const Tensor& t) {
  std::string sizes, strides;
  for (int64_t d = 0; d < t.dim(); ++d) {
    sizes += (d ? ", " : "") + std::to_string(t.size(d));
    strides += (d ? ", " : "") + std::to_string(t.stride(d));
  }
  return dtype_name(t.scalar_type()) + " [" + sizes + "], strides [" + strides + "]";
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t d = 0;
  for (int64_t size : shape)
    if (t.size(d++) != size) return false;
  return true;
}

inline void check_dense(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                        std::initializer_list<ScalarType> dtypes) {
  bool known = false;
  std::string expected;
  for (ScalarType dtype : dtypes) {
    known = known || t.scalar_type() == dtype;
    expected += (expected.empty() ? "" : " or ") + dtype_name(dtype);
  }
  expected += " [";
  const char* comma = "";
  for (int64_t size : shape) {
    expected += comma + std::to_string(size);
    comma = ", ";
  }
  STD_TORCH_CHECK(known && has_shape(t, shape) && t.is_contiguous(), name, " is ", describe(t), "; give a contiguous ",
                  expected, "]");
}

inline void check_floating(const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  " is ", describe(t), "; kernels take float32, bfloat16 or float16");
}

// A matrix whose rows are dense but may lie any distance apart.
inline void check_rows(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(has_shape(t, {rows, cols}) && (rows == 0 || cols <= 1 || t.stride(1) == 1), name, " is ", describe(t), "; give [",
                  rows, ", ", cols, "] with unit stride in the last dimension");
}

// Offsets must stay inside perm and perm inside the rows, whatever Python passed.
inline void check_plan(const Tensor& offsets, const Tensor& perm, int64_t n_groups, int64_t n_rows) {
  check_dense("offsets", offsets, {n_groups + 1}, {ScalarType::Int});
  check_dense("perm", perm, {n_rows}, {ScalarType::Int});
  const int32_t* bounds = offsets.const_data_ptr<int32_t>();
  bool sorted = bounds[0] == 0 && bounds[n_groups] <= n_rows;
  for (int64_t g = 0; g < n_groups; ++g) sorted = sorted && bounds[g] <= bounds[g + 1];
  STD_TORCH_CHECK(sorted, "offsets must rise from 0 to at most ", n_rows, "; take them from group_plan");
  const int32_t* rows = perm.const_data_ptr<int32_t>();
  bool inside = true;
  for (int64_t i = 0; i < n_rows; ++i) inside &= static_cast<uint32_t>(rows[i]) < static_cast<uint64_t>(n_rows);
  STD_TORCH_CHECK(inside, "perm must hold rows 0..", n_rows - 1, "; take it from group_plan");
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

// Calls f with a value of the tensor's element type.
template <class F>
void dispatch_floating(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, "kernels take float32, bfloat16 or float16, got ", dtype_name(dtype));
  }
}

template <class F>
void dispatch_index(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Int) return f(int32_t{});
  STD_TORCH_CHECK(dtype == ScalarType::Long, "ids and targets are int32 or int64, got ", dtype_name(dtype));
  f(int64_t{});
}

}  // namespace mtk
