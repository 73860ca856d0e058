#include "../common/check.h"
#include "../mtkernels.h"

#include <vector>

namespace mtk::cpu {
namespace {

constexpr int64_t kChunkRows = 1024;
constexpr int64_t kGrainRows = 32768;

struct Chunk {
  int64_t begin, end;  // sorted positions of one task
};

// Chunks start at the task's own first row: what else is in the batch moves no boundary.
std::vector<Chunk> chunk_tasks(const int32_t* offsets, int64_t n_tasks, std::vector<int64_t>* first_chunk) {
  std::vector<Chunk> chunks;
  for (int64_t j = 0; j < n_tasks; ++j) {
    first_chunk->push_back(static_cast<int64_t>(chunks.size()));
    for (int64_t begin = offsets[j]; begin < offsets[j + 1]; begin += kChunkRows)
      chunks.push_back({begin, std::min<int64_t>(begin + kChunkRows, offsets[j + 1])});
  }
  first_chunk->push_back(static_cast<int64_t>(chunks.size()));
  return chunks;
}

template <class T>
double sum_chunk(Chunk chunk, const T* values, const float* coef, const int32_t* perm) {
  double sum = 0;
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    const int32_t t = perm[i];
    const double value = static_cast<float>(values[t]);
    sum += coef ? coef[t] * value : value;
  }
  return sum;
}

template <class T>
void scatter_rows(const float* dsums, int64_t n_tasks, const T* values, const float* coef, const int32_t* ids,
                  int64_t begin, int64_t end, T* dvalues, float* dcoef) {
  for (int64_t t = begin; t < end; ++t) {
    const bool grouped = ids[t] >= 0 && ids[t] < n_tasks;
    const float dsum = grouped ? dsums[ids[t]] : 0.0f;
    dvalues[t] = static_cast<T>(grouped && coef ? dsum * coef[t] : dsum);
    if (coef) dcoef[t] = grouped ? dsum * static_cast<float>(values[t]) : 0.0f;
  }
}

const float* check_values(const Tensor& values, const OptionalTensor& coef) {
  check_floating("values", values);
  check_dense("values", values, {values.numel()}, {values.scalar_type()});
  if (!coef) return nullptr;
  check_dense("coef", *coef, {values.numel()}, {ScalarType::Float});
  return coef->const_data_ptr<float>();
}

}  // namespace

Tensor task_reduce_fwd(Tensor values, OptionalTensor coef, Tensor offsets, Tensor perm, Tensor) {
  const float* coef_p = check_values(values, coef);
  const int64_t n_tasks = offsets.numel() - 1;
  STD_TORCH_CHECK(n_tasks >= 0, "offsets is empty; take it from group_plan");
  check_plan(offsets, perm, n_tasks, values.numel());
  const int32_t* perm_p = perm.const_data_ptr<int32_t>();

  std::vector<int64_t> first_chunk;
  const std::vector<Chunk> chunks = chunk_tasks(offsets.const_data_ptr<int32_t>(), n_tasks, &first_chunk);
  std::vector<double> partial(chunks.size());
  dispatch_floating(values.scalar_type(), [&](auto element) {
    const auto* values_p = values.const_data_ptr<decltype(element)>();
    torch::stable::parallel_for(0, chunks.size(), kGrainRows / kChunkRows, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) partial[c] = sum_chunk(chunks[c], values_p, coef_p, perm_p);
    });
  });

  Tensor sums = empty(values, {n_tasks}, ScalarType::Float);
  float* sums_p = sums.mutable_data_ptr<float>();
  for (int64_t j = 0; j < n_tasks; ++j) {
    double sum = 0;
    for (int64_t c = first_chunk[j]; c < first_chunk[j + 1]; ++c) sum += partial[c];
    sums_p[j] = static_cast<float>(sum);
  }
  return sums;
}

std::tuple<Tensor, Tensor> task_reduce_bwd(Tensor dsums, Tensor values, OptionalTensor coef, Tensor ids) {
  const float* coef_p = check_values(values, coef);
  const int64_t n_rows = values.numel(), n_tasks = dsums.numel();
  check_dense("dsums", dsums, {n_tasks}, {ScalarType::Float});
  check_dense("ids", ids, {n_rows}, {ScalarType::Int});
  Tensor dvalues = empty(values, {n_rows}, values.scalar_type());
  Tensor dcoef = empty(values, {coef ? n_rows : 0}, ScalarType::Float);

  const float* dsums_p = dsums.const_data_ptr<float>();
  const int32_t* ids_p = ids.const_data_ptr<int32_t>();
  float* dcoef_p = dcoef.mutable_data_ptr<float>();
  dispatch_floating(values.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* values_p = values.const_data_ptr<T>();
    T* dvalues_p = dvalues.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, n_rows, kGrainRows, [&](int64_t begin, int64_t end) {
      scatter_rows(dsums_p, n_tasks, values_p, coef_p, ids_p, begin, end, dvalues_p, dcoef_p);
    });
  });
  return {dvalues, dcoef};
}

}  // namespace mtk::cpu
