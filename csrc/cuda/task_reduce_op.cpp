#include "../common/cuda.h"
#include "../mtkernels.h"

#include <limits>

namespace mtk::cuda {

// Defined in task_reduce.cu, which knows no torch.
const char* launch_task_reduce_fwd(Element element, const void* values, const float* coef, const int* offsets,
                                   const int* perm, const int* tiles, int n_rows, int n_tasks, float* partial,
                                   int n_partial, float* sums, void* stream);
const char* launch_task_reduce_bwd(Element element, const float* dsums, const void* values, const float* coef,
                                   const int* ids, int n_rows, int n_tasks, void* dvalues, float* dcoef,
                                   void* stream);

namespace {

constexpr int64_t kChunkRows = 1024;
constexpr int64_t kTileSizes = 5, kChunkTile = 4;  // TILE_ROWS[4] == kChunkRows

const float* check_values(const Tensor& values, const OptionalTensor& coef) {
  check_dense("values", values, {values.numel()}, {values.scalar_type()});
  STD_TORCH_CHECK(values.numel() < std::numeric_limits<int32_t>::max() - kChunkRows, "values has ", values.numel(),
                  " rows; fewer than 2^31 - 1024 are supported");
  if (!coef) return nullptr;
  check_cuda("coef", *coef, values);
  check_dense("coef", *coef, {values.numel()}, {ScalarType::Float});
  return coef->const_data_ptr<float>();
}

}  // namespace

Tensor task_reduce_fwd(Tensor values, OptionalTensor coef, Tensor offsets, Tensor perm, Tensor tiles) {
  const Element element = element_of(values);
  const float* coef_p = check_values(values, coef);
  const int64_t n_rows = values.numel(), n_tasks = offsets.numel() - 1;
  STD_TORCH_CHECK(n_tasks >= 0, "offsets is empty; take it from group_plan");
  for (const auto& [name, t] : {std::pair{"offsets", &offsets}, {"perm", &perm}, {"tiles", &tiles}})
    check_cuda(name, *t, values);
  check_dense("offsets", offsets, {n_tasks + 1}, {ScalarType::Int});
  check_dense("perm", perm, {n_rows}, {ScalarType::Int});
  check_dense("tiles", tiles, {kTileSizes, n_tasks + 1}, {ScalarType::Int});

  const CudaScope scope(values);
  const int64_t n_partial = (n_rows + kChunkRows - 1) / kChunkRows + n_tasks;
  Tensor partial = empty(values, {n_partial}, ScalarType::Float), sums = empty(values, {n_tasks}, ScalarType::Float);
  check_launch("task_reduce_fwd",
               launch_task_reduce_fwd(element, values.const_data_ptr(), coef_p, offsets.const_data_ptr<int32_t>(),
                                      perm.const_data_ptr<int32_t>(),
                                      tiles.const_data_ptr<int32_t>() + kChunkTile * (n_tasks + 1), n_rows, n_tasks,
                                      partial.mutable_data_ptr<float>(), n_partial, sums.mutable_data_ptr<float>(),
                                      scope.stream()));
  return sums;
}

std::tuple<Tensor, Tensor> task_reduce_bwd(Tensor dsums, Tensor values, OptionalTensor coef, Tensor ids) {
  const Element element = element_of(values);
  const float* coef_p = check_values(values, coef);
  const int64_t n_rows = values.numel(), n_tasks = dsums.numel();
  check_cuda("dsums", dsums, values);
  check_cuda("ids", ids, values);
  check_dense("dsums", dsums, {n_tasks}, {ScalarType::Float});
  check_dense("ids", ids, {n_rows}, {ScalarType::Int});

  const CudaScope scope(values);
  Tensor dvalues = empty(values, {n_rows}, values.scalar_type());
  Tensor dcoef = empty(values, {coef ? n_rows : 0}, ScalarType::Float);
  check_launch("task_reduce_bwd",
               launch_task_reduce_bwd(element, dsums.const_data_ptr<float>(), values.const_data_ptr(), coef_p,
                                      ids.const_data_ptr<int32_t>(), n_rows, n_tasks, dvalues.mutable_data_ptr(),
                                      dcoef.mutable_data_ptr<float>(), scope.stream()));
  return {dvalues, dcoef};
}

}  // namespace mtk::cuda
