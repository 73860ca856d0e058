#include "../common/check.h"
#include "../mtkernels.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace mtk::cpu {
namespace {

constexpr int64_t kTileRows[] = {16, 32, 64, 128, 1024};
constexpr int64_t kTileSizes = 5;
constexpr int64_t kSliceRows = 16384;  // below this a thread costs more than it saves

// Slices of the positions, each with its own histogram: bucket G counts positions without group. The stable order is
// unique, so the number of slices changes nothing but speed.
struct Slices {
  int64_t n_rows, count;
  int64_t begin(int64_t s) const { return n_rows * s / count; }
};

Slices slice_rows(int64_t n_rows, int64_t n_groups) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t by_rows = n_rows / std::max(kSliceRows, n_groups + 1);
  return {n_rows, std::clamp<int64_t>(by_rows, 1, std::max<int64_t>(threads, 1))};
}

template <class Index>
void count_slice(const Index* ids, int64_t begin, int64_t end, int64_t n_groups, int32_t* ids32, int32_t* histogram) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = ids[i];
    const bool grouped = id >= 0 && id < n_groups;
    ids32[i] = grouped ? static_cast<int32_t>(id) : -1;
    ++histogram[grouped ? id : n_groups];
  }
}

void place_slice(const int32_t* ids32, int64_t begin, int64_t end, int64_t n_groups, int32_t* next, int32_t* perm,
                 int32_t* inv_perm) {
  for (int64_t i = begin; i < end; ++i) {
    const int32_t j = next[ids32[i] < 0 ? n_groups : ids32[i]]++;
    perm[j] = static_cast<int32_t>(i);
    inv_perm[i] = j;
  }
}

// Turns the per-slice counts into each slice's first sorted position of each group.
void scan_counts(int64_t n_groups, int64_t slices, int32_t* histogram, int32_t* counts, int32_t* offsets) {
  int32_t position = 0;
  for (int64_t g = 0; g <= n_groups; ++g) {
    offsets[g] = position;
    for (int64_t s = 0; s < slices; ++s) {
      int32_t& bucket = histogram[s * (n_groups + 1) + g];
      const int32_t size = bucket;
      bucket = position;
      position += size;
    }
    if (g < n_groups) counts[g] = position - offsets[g];
  }
}

void count_tiles(const int32_t* counts, int64_t n_groups, int32_t* tiles) {
  for (int64_t b = 0; b < kTileSizes; ++b) {
    int32_t* row = tiles + b * (n_groups + 1);
    row[0] = 0;
    for (int64_t g = 0; g < n_groups; ++g)
      row[g + 1] = row[g] + static_cast<int32_t>((counts[g] + kTileRows[b] - 1) / kTileRows[b]);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_plan(Tensor ids, int64_t n_groups) {
  const int64_t n_rows = ids.numel();
  check_dense("ids", ids, {n_rows}, {ScalarType::Int, ScalarType::Long});
  STD_TORCH_CHECK(n_groups >= 0 && n_rows + n_groups < std::numeric_limits<int32_t>::max(), n_rows, " ids in ",
                  n_groups, " groups; their sum must be at least 0 and below 2^31 - 1");
  const auto int32 = [&](std::initializer_list<int64_t> shape) { return empty(ids, shape, ScalarType::Int); };
  Tensor ids32 = int32({n_rows}), counts = int32({n_groups}), offsets = int32({n_groups + 1});
  Tensor perm = int32({n_rows}), inv_perm = int32({n_rows}), tiles = int32({kTileSizes, n_groups + 1});

  int32_t* ids32_p = ids32.mutable_data_ptr<int32_t>();
  int32_t* counts_p = counts.mutable_data_ptr<int32_t>();
  int32_t* perm_p = perm.mutable_data_ptr<int32_t>();
  int32_t* inv_perm_p = inv_perm.mutable_data_ptr<int32_t>();
  const Slices slices = slice_rows(n_rows, n_groups);
  std::vector<int32_t> histogram(slices.count * (n_groups + 1));

  dispatch_index(ids.scalar_type(), [&](auto index) {
    const auto* ids_p = ids.const_data_ptr<decltype(index)>();
    torch::stable::parallel_for(0, slices.count, 1, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s)
        count_slice(ids_p, slices.begin(s), slices.begin(s + 1), n_groups, ids32_p, &histogram[s * (n_groups + 1)]);
    });
  });
  scan_counts(n_groups, slices.count, histogram.data(), counts_p, offsets.mutable_data_ptr<int32_t>());
  torch::stable::parallel_for(0, slices.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s)
      place_slice(ids32_p, slices.begin(s), slices.begin(s + 1), n_groups, &histogram[s * (n_groups + 1)], perm_p,
                  inv_perm_p);
  });
  count_tiles(counts_p, n_groups, tiles.mutable_data_ptr<int32_t>());
  return {ids32, counts, offsets, perm, inv_perm, tiles};
}

}  // namespace mtk::cpu
