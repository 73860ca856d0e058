#include "../common/check.h"
#include "../mtkernels.h"
#include "dora_rows.h"
#include "isa.h"

#include <algorithm>
#include <vector>

namespace mtk::cpu {
namespace {

// Rows whose gradient is summed in one go: fixed, because it fixes the order of the sum.
constexpr int64_t kChunkRows = 256;
constexpr int64_t kGrainElements = 32768;

int64_t index_of(ScalarType dtype) { return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2; }

const DoraRows& rows_of(ScalarType dtype) {
  const DoraRows* table = dora_rows_generic;
#ifdef __x86_64__
  if (isa() == Isa::avx2) table = dora_rows_avx2;
  if (isa() == Isa::avx512) table = dora_rows_avx512;
#endif
  return table[index_of(dtype)];
}

const DoraBlocks& blocks() {
#ifdef __x86_64__
  if (isa() == Isa::avx512) return dora_blocks_avx512;
  if (isa() == Isa::avx2) return dora_blocks_avx2;
#endif
  return dora_blocks_generic;
}

// Element (i, j) of a matrix with any strides.
struct Matrix {
  const char* data;
  int64_t row_stride, col_stride;  // bytes
  ScalarType dtype;

  explicit Matrix(const Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())), dtype(t.scalar_type()) {
    const int64_t item = dtype == ScalarType::Float ? 4 : 2;
    row_stride = t.stride(0) * item;
    col_stride = t.stride(1) * item;
  }
};

// dst[i * dst_stride + j] = m(row + i, col + j) in fp32
void pack(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst, int64_t dst_stride) {
  dispatch_floating(m.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t item = static_cast<int64_t>(sizeof(T));
    const DoraRows& kernels = rows_of(m.dtype);
    for (int64_t i = 0; i < rows; ++i) {
      const char* from = m.data + (row + i) * m.row_stride + col * m.col_stride;
      if (m.col_stride == item) {
        kernels.widen(from, cols, dst + i * dst_stride);
        continue;
      }
      for (int64_t j = 0; j < cols; ++j)
        dst[i * dst_stride + j] = static_cast<float>(*reinterpret_cast<const T*>(from + j * m.col_stride));
    }
  });
}

// dst[j * dst_stride + i] = m(row + i, j) in fp32
void pack_transposed(const Matrix& m, int64_t row, int64_t rows, int64_t cols, float* dst, int64_t dst_stride) {
  dispatch_floating(m.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        dst[j * dst_stride + i] = static_cast<float>(*reinterpret_cast<const T*>(m.data + (row + i) * m.row_stride + j * m.col_stride));
  });
}

struct NormCall {
  int64_t D, O, max_rank;
  Matrix weight;
  std::vector<Matrix> A, B;
  std::vector<int64_t> rank;
  const float* scale;
  float* norm;
};

// Rows [row, row + kNormRows) of every adapter's norm: each block of W is packed once for all of them.
void norm_rows(const NormCall& call, int64_t row) {
  const DoraBlocks& kernels = blocks();
  const int64_t n = static_cast<int64_t>(call.A.size()), rows = std::min(kNormRows, call.O - row);
  std::vector<float> w(kNormRows * kNormCols), a(call.max_rank * kNormCols), b(call.max_rank * kNormRows);
  std::vector<float> sums(n * kNormRows * kernels.width);
  for (int64_t col = 0; col < call.D; col += kNormCols) {
    const int64_t cols = std::min(kNormCols, call.D - col);
    if (cols < kNormCols) {
      std::fill(w.begin(), w.end(), 0.0f);
      std::fill(a.begin(), a.end(), 0.0f);
    }
    pack(call.weight, row, rows, col, cols, w.data(), kNormCols);
    for (int64_t i = 0; i < n; ++i) {
      pack(call.A[i], 0, call.rank[i], col, cols, a.data(), kNormCols);
      pack_transposed(call.B[i], row, rows, call.rank[i], b.data(), kNormRows);
      kernels.add_squares(w.data(), b.data(), a.data(), call.rank[i], rows, cols, call.scale[i], &sums[i * kNormRows * kernels.width]);
    }
  }
  for (int64_t i = 0; i < n; ++i) kernels.finish(&sums[i * kNormRows * kernels.width], rows, call.norm + i * call.O + row);
}

int64_t grain_rows(int64_t width) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width)); }

void check_row_scale(const Tensor& scale, const Tensor& z) {
  check_dense("scale", scale, {scale.dim() == 2 ? scale.size(0) : -1, z.size(1)}, {ScalarType::Float});
}

const char* row_at(const Tensor& t, int64_t row) {
  return static_cast<const char*>(t.const_data_ptr()) + row * t.stride(0) * (t.scalar_type() == ScalarType::Float ? 4 : 2);
}

char* row_at(Tensor& t, int64_t row) { return const_cast<char*>(row_at(static_cast<const Tensor&>(t), row)); }

struct Chunk {
  int64_t adapter, begin, end;  // sorted positions
};

// Chunks start at the adapter's own first row; those of no adapter come last.
std::vector<Chunk> chunk_rows(const int32_t* offsets, int64_t n, int64_t n_rows) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i <= n; ++i)
    for (int64_t begin = offsets[i], end = i < n ? offsets[i + 1] : n_rows; begin < end; begin += kChunkRows)
      chunks.push_back({i, begin, std::min(begin + kChunkRows, end)});
  return chunks;
}

}  // namespace

Tensor dora_norm(Tensor weight, std::vector<Tensor> A, std::vector<Tensor> B, Tensor scale) {
  const int64_t n = static_cast<int64_t>(A.size());
  check_floating("weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2 && n == static_cast<int64_t>(B.size()), "weight is ", describe(weight), " with ", n, " A and ", B.size(), " B");
  check_dense("scale", scale, {n}, {ScalarType::Float});
  const int64_t O = weight.size(0), D = weight.size(1);
  Tensor norm = empty(weight, {n, O}, ScalarType::Float);
  NormCall call{D, O, 0, Matrix(weight), {}, {}, {}, scale.const_data_ptr<float>(), norm.mutable_data_ptr<float>()};
  for (int64_t i = 0; i < n; ++i) {
    check_floating("A", A[i]);
    check_floating("B", B[i]);
    STD_TORCH_CHECK(A[i].dim() == 2 && has_shape(A[i], {A[i].size(0), D}) && has_shape(B[i], {O, A[i].size(0)}), "adapter ", i, " has A ",
                    describe(A[i]), " and B ", describe(B[i]), " for weight ", describe(weight));
    call.A.emplace_back(A[i]);
    call.B.emplace_back(B[i]);
    call.rank.push_back(A[i].size(0));
    call.max_rank = std::max(call.max_rank, A[i].size(0));
  }
  torch::stable::parallel_for(0, (O + kNormRows - 1) / kNormRows, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) norm_rows(call, i * kNormRows);
  });
  return norm;
}

Tensor dora_dropout(Tensor x, Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor, Tensor step, int64_t site) {
  check_floating("x", x);
  STD_TORCH_CHECK(x.dim() == 2, "x is ", describe(x), "; give rows");
  const int64_t T = x.size(0), D = x.size(1), n = threshold.numel();
  check_rows("x", x, T, D);
  check_dense("threshold", threshold, {n}, {ScalarType::Int});
  check_dense("seeds", seeds, {n}, {ScalarType::Long});
  check_dense("step", step, {}, {ScalarType::Long});
  check_plan(offsets, perm, n, T);
  Tensor y = empty(x, {T, D}, x.scalar_type());
  const int32_t *offsets_p = offsets.const_data_ptr<int32_t>(), *perm_p = perm.const_data_ptr<int32_t>();
  const uint32_t step32 = static_cast<uint32_t>(*step.const_data_ptr<int64_t>());
  const DoraRows& kernels = rows_of(x.scalar_type());
  torch::stable::parallel_for(0, T, grain_rows(D), [&](int64_t first, int64_t last) {
    int64_t i = std::upper_bound(offsets_p, offsets_p + n + 1, first) - offsets_p - 1;
    for (int64_t j = first; j < last; ++j) {
      while (i < n && j >= offsets_p[i + 1]) ++i;
      const int64_t t = perm_p[j];
      const uint32_t limit = i < n ? static_cast<uint32_t>(std::clamp(threshold.const_data_ptr<int32_t>()[i], 0, 65536)) : 0;
      if (!limit) {
        kernels.rescale(row_at(x, t), nullptr, nullptr, D, row_at(y, t));
        continue;
      }
      const uint64_t seed = static_cast<uint64_t>(seeds.const_data_ptr<int64_t>()[i]);
      const DropoutKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(j - offsets_p[i]),
                              static_cast<uint32_t>(site), step32};
      kernels.drop(row_at(x, t), D, key, limit, limit == 65536 ? 0.f : 65536.f / static_cast<float>(65536 - limit), row_at(y, t));
    }
  });
  return y;
}

Tensor dora_fwd(Tensor z, OptionalTensor base, Tensor scale, Tensor ids) {
  check_floating("z", z);
  STD_TORCH_CHECK(z.dim() == 2, "z is ", describe(z), "; give rows");
  const int64_t T = z.size(0), O = z.size(1);
  check_rows("z", z, T, O);
  check_row_scale(scale, z);
  check_dense("ids", ids, {T}, {ScalarType::Int});
  if (base) {
    check_rows("base", *base, T, O);
    STD_TORCH_CHECK(base->scalar_type() == z.scalar_type(), "base is ", describe(*base), ", z is ", describe(z), "; use one dtype");
  }
  Tensor y = empty(z, {T, O}, z.scalar_type());
  const int32_t* ids_p = ids.const_data_ptr<int32_t>();
  const float* scale_p = scale.const_data_ptr<float>();
  const DoraRows& kernels = rows_of(z.scalar_type());
  torch::stable::parallel_for(0, T, grain_rows(O), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const bool scaled = ids_p[t] >= 0 && ids_p[t] < scale.size(0);
      kernels.rescale(row_at(z, t), scaled ? scale_p + ids_p[t] * O : nullptr, base ? row_at(*base, t) : nullptr, O, row_at(y, t));
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> dora_bwd(Tensor dy, OptionalTensor z, Tensor scale, Tensor, Tensor offsets, Tensor perm, Tensor) {
  check_floating("dy", dy);
  STD_TORCH_CHECK(dy.dim() == 2, "dy is ", describe(dy), "; give rows");
  const int64_t T = dy.size(0), O = dy.size(1), n = scale.size(0);
  check_rows("dy", dy, T, O);
  check_row_scale(scale, dy);
  if (z) {
    check_rows("z", *z, T, O);
    STD_TORCH_CHECK(z->scalar_type() == dy.scalar_type(), "z is ", describe(*z), ", dy is ", describe(dy), "; use one dtype");
  }
  check_plan(offsets, perm, n, T);
  const int32_t* perm_p = perm.const_data_ptr<int32_t>();
  const float* scale_p = scale.const_data_ptr<float>();
  const std::vector<Chunk> chunks = chunk_rows(offsets.const_data_ptr<int32_t>(), n, T);
  Tensor dz = empty(dy, {T, O}, dy.scalar_type());
  std::vector<float> partial(z ? chunks.size() * O : 0);
  const DoraRows& kernels = rows_of(dy.scalar_type());
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = chunks[c];
      const bool scaled = chunk.adapter < n;
      for (int64_t j = chunk.begin; j < chunk.end; ++j) {
        const int64_t t = perm_p[j];
        kernels.gradient(row_at(dy, t), scaled && z ? row_at(*z, t) : nullptr, scaled ? scale_p + chunk.adapter * O : nullptr, O,
                         j > chunk.begin, row_at(dz, t), z ? &partial[c * O] : nullptr);
      }
    }
  });
  if (!z) return {dz, empty(dy, {0}, ScalarType::Float)};

  Tensor dscale = empty(dy, {n, O}, ScalarType::Float);
  float* dscale_p = dscale.mutable_data_ptr<float>();
  std::fill_n(dscale_p, n * O, 0.0f);
  for (size_t c = 0; c < chunks.size() && chunks[c].adapter < n; ++c)
    for (int64_t o = 0; o < O; ++o) dscale_p[chunks[c].adapter * O + o] += partial[c * O + o];
  return {dz, dscale};
}

}  // namespace mtk::cpu
