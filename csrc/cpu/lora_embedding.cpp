#include "../common/check.h"
#include "../mtkernels.h"
#include "isa.h"
#include "lora_embedding_rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace mtk::cpu {
namespace {

constexpr int64_t kGatherRows = 512;  // positions whose part of S stays in cache while the ranks are walked
constexpr int64_t kGrainRuns = 64;

const EmbeddingRows& rows_of(ScalarType dtype) {
  const EmbeddingRows* table = embedding_generic;
#ifdef __x86_64__
  if (isa() == Isa::avx2) table = embedding_avx2;
  if (isa() == Isa::avx512) table = embedding_avx512;
#endif
  return table[dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2];
}

// Tokens as int64; K positions share one.
struct Tokens {
  std::vector<int64_t> token;
  int64_t n_slots;

  int64_t of(int64_t position) const { return token[position / n_slots]; }
};

Tokens read_tokens(const Tensor& token, int64_t n_positions) {
  check_dense("token", token, {token.numel()}, {ScalarType::Int, ScalarType::Long});
  Tokens found;
  found.n_slots = token.numel() ? n_positions / token.numel() : 1;
  STD_TORCH_CHECK(token.numel() * found.n_slots == n_positions || !token.numel(), "the plan has ", n_positions, " positions for ",
                  token.numel(), " tokens");
  dispatch_index(token.scalar_type(), [&](auto index) {
    const auto* p = token.const_data_ptr<decltype(index)>();
    found.token.assign(p, p + token.numel());
  });
  return found;
}

// A factor [rank, V] or its gradient: rows any distance apart, unit stride in them.
void check_table(const Tensor& t, int64_t n_tokens) { check_rows("A or dA", t, t.dim() == 2 ? t.size(0) : -1, n_tokens); }

struct Chunk {
  int64_t adapter, begin, end;  // sorted positions
};

std::vector<Chunk> chunk_positions(const int32_t* offsets, int64_t n, int64_t n_positions) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i <= n; ++i)  // those of no adapter last
    for (int64_t begin = offsets[i], end = i < n ? offsets[i + 1] : n_positions; begin < end; begin += kGatherRows)
      chunks.push_back({i, begin, std::min(begin + kGatherRows, end)});
  return chunks;
}

// One rank at a time, so that its row of A is what the cache holds.
template <class F, class S>
void gather(const Chunk& chunk, const int32_t* perm, const Tokens& tokens, const Tensor* A, S* s, int64_t stride, int64_t width) {
  const int64_t rank = A ? A->size(0) : 0, n_tokens = rank ? A->size(1) : 0;
  for (int64_t j = chunk.begin; j < chunk.end; ++j) std::fill_n(s + perm[j] * stride + rank, width - rank, static_cast<S>(0.0f));
  for (int64_t r = 0; r < rank; ++r) {
    const F* row = A->const_data_ptr<F>() + r * A->stride(0);
    for (int64_t j = chunk.begin; j < chunk.end; ++j) {
      const int64_t v = tokens.of(perm[j]);
      const float value = v >= 0 && v < n_tokens ? static_cast<float>(row[v]) : 0.0f;
      s[perm[j] * stride + r] = static_cast<S>(value);
    }
  }
}

// The positions of one (adapter, token), ascending: places[begin, end).
struct Run {
  int64_t adapter, token, begin, end;
};

// Sorts an adapter's positions by token into places[begin, ...) and lists the runs; those without gradient are left out.
void find_runs(int64_t i, const int32_t* perm, int64_t begin, int64_t end, const Tokens& tokens, int64_t n_tokens, int64_t padding,
               int64_t* places, std::vector<Run>* runs) {
  std::vector<std::pair<int64_t, int64_t>> order;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t v = tokens.of(perm[j]);
    if (v >= 0 && v < n_tokens && v != padding) order.emplace_back(v, j);
  }
  std::sort(order.begin(), order.end());
  for (size_t k = 0; k < order.size(); ++k) {
    const int64_t place = begin + static_cast<int64_t>(k);
    places[place] = perm[order[k].second];
    if (k == 0 || order[k].first != order[k - 1].first) runs->push_back({i, order[k].first, place, place});
    runs->back().end = place + 1;
  }
}

// dA[:, token] = sum
template <class T>
void write_column(Tensor& dA, int64_t token, const float* sum) {
  T* p = dA.mutable_data_ptr<T>() + token;
  for (int64_t r = 0; r < dA.size(0); ++r) p[r * dA.stride(0)] = static_cast<T>(sum[r]);
}

void zero_rows(Tensor& t) {
  const int64_t width = t.size(1), item = t.scalar_type() == ScalarType::Float ? 4 : 2;
  char* p = static_cast<char*>(t.mutable_data_ptr());
  torch::stable::parallel_for(0, t.size(0), std::max<int64_t>(1, 65536 / std::max<int64_t>(1, width)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) std::memset(p + r * t.stride(0) * item, 0, static_cast<size_t>(width * item));
  });
}

}  // namespace

void lora_embedding_fwd(Tensor token, std::vector<Tensor> A, Tensor, Tensor offsets, Tensor perm, Tensor, Tensor s) {
  const int64_t n = static_cast<int64_t>(A.size()), n_positions = perm.numel();
  check_plan(offsets, perm, n, n_positions);
  const Tokens tokens = read_tokens(token, n_positions);
  check_rows("s", s, n_positions, s.dim() == 2 ? s.size(1) : -1);
  for (const Tensor& a : A) {
    check_table(a, A[0].size(1));
    STD_TORCH_CHECK(a.size(0) <= s.size(1) && a.scalar_type() == A[0].scalar_type(), "A is ", describe(a), " beside s ", describe(s));
  }
  const int32_t* perm_p = perm.const_data_ptr<int32_t>();
  const std::vector<Chunk> chunks = chunk_positions(offsets.const_data_ptr<int32_t>(), n, n_positions);
  dispatch_floating(n ? A[0].scalar_type() : s.scalar_type(), [&](auto factor) {
    dispatch_floating(s.scalar_type(), [&](auto element) {
      using S = decltype(element);
      S* s_p = s.mutable_data_ptr<S>();
      torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c)
          gather<decltype(factor)>(chunks[c], perm_p, tokens, chunks[c].adapter < n ? &A[chunks[c].adapter] : nullptr, s_p, s.stride(0), s.size(1));
      });
    });
  });
}

void lora_embedding_bwd(Tensor ds, Tensor token, int64_t padding, Tensor, Tensor offsets, Tensor perm, Tensor, std::vector<Tensor> dA) {
  const int64_t n = static_cast<int64_t>(dA.size()), n_positions = perm.numel();
  check_plan(offsets, perm, n, n_positions);
  const Tokens tokens = read_tokens(token, n_positions);
  check_floating("ds", ds);
  check_rows("ds", ds, n_positions, ds.dim() == 2 ? ds.size(1) : -1);
  ScalarType dtype = ScalarType::Float;
  for (Tensor& t : dA) {
    if (!t.numel()) continue;
    check_floating("dA", t);
    check_table(t, t.size(1));
    STD_TORCH_CHECK(t.size(0) <= ds.size(1), "dA is ", describe(t), " beside ds ", describe(ds));
    dtype = t.scalar_type();
    zero_rows(t);
  }
  const int32_t *offsets_p = offsets.const_data_ptr<int32_t>(), *perm_p = perm.const_data_ptr<int32_t>();
  std::vector<int64_t> places(static_cast<size_t>(n_positions));
  std::vector<std::vector<Run>> runs_of(static_cast<size_t>(n));
  torch::stable::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      if (dA[i].numel()) find_runs(i, perm_p, offsets_p[i], offsets_p[i + 1], tokens, dA[i].size(1), padding, places.data(), &runs_of[i]);
  });
  std::vector<Run> runs;
  for (const auto& found : runs_of) runs.insert(runs.end(), found.begin(), found.end());

  const EmbeddingRows& kernels = rows_of(ds.scalar_type());
  dispatch_floating(dtype, [&](auto element) {
    torch::stable::parallel_for(0, static_cast<int64_t>(runs.size()), kGrainRuns, [&](int64_t first, int64_t last) {
      std::vector<float> sum(static_cast<size_t>(ds.size(1)));
      for (int64_t k = first; k < last; ++k) {
        const Run& run = runs[k];
        kernels.sum(ds.const_data_ptr(), ds.stride(0), &places[run.begin], run.end - run.begin, dA[run.adapter].size(0), sum.data());
        write_column<decltype(element)>(dA[run.adapter], run.token, sum.data());
      }
    });
  });
}

}  // namespace mtk::cpu
