#include "lora_work.h"

#include "../common/check.h"
#include "lora_run.h"

#include <algorithm>

namespace mtk::cpu {
namespace {

using Items = std::vector<LoraItem>;

int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a part differ by at most one from another's.
int64_t cut(int64_t n, int64_t parts, int64_t i) { return n / parts * i + std::min(i, n % parts); }

int64_t row_groups(int64_t n) { return std::max<int64_t>(1, ceil_div(n, kGroupRows)); }

// Whole blocks, at most `kMaxPieces` pieces of a row. Depends on the row length only: it fixes the order in which d is summed.
constexpr int64_t kMaxPieces = 8;
int64_t piece_cols(int64_t cols) { return std::max<int64_t>(1, ceil_div(ceil_div(cols, kItemCols), kMaxPieces)) * kItemCols; }

// Rows made and then read again: few enough to stay in cache, enough to pay for packing the factors.
constexpr int64_t kMadeRows = 2 * 72;

// Per column; the constants stand for moving a row and for packing the factors.
int64_t cost(int64_t ranks, int64_t rows) { return (rows + 8) * (ranks + 24); }

// Ranks that an item of group i works on: those of one target, or of all.
int64_t item_ranks(const LoraPlan& plan, int64_t target, int64_t i) {
  int64_t ranks = 0;
  for (int64_t g = 0; g < plan.call.n_targets; ++g)
    if (target < 0 || g == target) ranks += plan.targets[g].adapters[i].ranks();
  return ranks;
}

int64_t item_cost(const LoraPlan& plan, const LoraItem& item) {
  return cost(item_ranks(plan, item.target, item.group), item.row1 - item.row0) * (item.col1 - item.col0);
}

// The cost that makes a thread's share of all targets, in four items.
int64_t share_of(const LoraPlan& plan) {
  int64_t total = 0;
  for (int64_t i = 0; i < plan.call.n_groups; ++i) total += cost(item_ranks(plan, -1, i), plan.groups[i].n);
  return total / (4 * num_threads()) + 1;
}

// Runs the items in any order; or, where several adapters add to one row, those of the same columns in the order given.
void run(const LoraPlan& plan, Items& items, LoraKernel kernel, bool in_order) {
  if (!in_order) {  // dear items first, so that threads finish together
    std::vector<std::pair<int64_t, LoraItem>> dear;
    for (const LoraItem& item : items) dear.emplace_back(-item_cost(plan, item), item);
    std::stable_sort(dear.begin(), dear.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (size_t i = 0; i < items.size(); ++i) items[i] = dear[i].second;
  }
  std::vector<size_t> chains;
  for (size_t i = 0; i < items.size(); ++i)
    if (!in_order || i == 0 || items[i].col0 != items[i - 1].col0 || items[i].target != items[i - 1].target) chains.push_back(i);
  const int64_t n = static_cast<int64_t>(chains.size());
  chains.push_back(items.size());
  run_items(n, lora_kernels().scratch(plan.max_ranks(), plan.call.n_targets), [&](int64_t c, float* scratch) {
    for (size_t i = chains[c]; i < chains[c + 1]; ++i) kernel(plan.call, items[i], scratch);
  });
}

// Items over parts of at most kForwardRows of every adapter's rows.
void add_row_items(const LoraPlan& plan, int64_t target, int64_t col0, int64_t col1, Items& items) {
  const int64_t share = share_of(plan);
  for (int64_t i = 0; i < plan.call.n_groups; ++i) {
    const int64_t n = plan.groups[i].n;
    const int64_t balanced = num_threads() == 1 ? 1 : std::min(ceil_div(cost(item_ranks(plan, target, i), n), share), ceil_div(n, 24));
    const int64_t parts = std::max(balanced, ceil_div(n, kForwardRows));
    for (int64_t p = 0; n && p < parts; ++p) items.push_back({i, target, cut(n, parts, p), cut(n, parts, p + 1), col0, col1, 0});
  }
}

// Items over row groups and, where an adapter outweighs a thread's share, over pieces of its columns; `alike`: over the same pieces for all.
template <class Wanted>
void add_column_items(const LoraPlan& plan, int64_t target, int64_t cols, Items& items, bool alike, const Wanted& wanted) {
  const int64_t piece = piece_cols(cols), pieces = ceil_div(cols, piece), share = share_of(plan);
  for (int64_t i = 0; i < plan.call.n_groups; ++i) {
    if (!wanted(i)) continue;
    const int64_t n = plan.groups[i].n, groups = row_groups(n), ranks = item_ranks(plan, target, i);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row0 = cut(n, groups, g), row1 = cut(n, groups, g + 1);
      const int64_t most = num_threads() == 1 ? 1 : std::max<int64_t>(1, pieces);
      const int64_t parts = alike ? most : std::clamp<int64_t>(ceil_div(cost(ranks, row1 - row0), share), 1, most);
      const int64_t width = ceil_div(pieces, parts) * piece;
      for (int64_t col = 0; col < cols; col += width) items.push_back({i, target, row0, row1, col, std::min(cols, col + width), g});
    }
  }
}

// One item per column piece of every gradient that is in several partial sums; `row_group` holds their number.
template <class Partial>
void run_reduce(const LoraPlan& plan, LoraKernel kernel, const Partial& columns_of) {
  Items items;
  for (int64_t g = 0; g < plan.call.n_targets; ++g)
    for (int64_t i = 0; i < plan.call.n_groups; ++i) {
      const int64_t cols = columns_of(plan.targets[g], plan.targets[g].adapters[i]), piece = piece_cols(cols);
      for (int64_t col = 0; col < cols; col += piece) items.push_back({i, g, 0, 0, col, std::min(cols, col + piece), row_groups(plan.groups[i].n)});
    }
  run(plan, items, kernel, false);
}

template <class F>
void for_adapters(LoraPlan& plan, const F& f) {
  for (int64_t g = 0; g < plan.call.n_targets; ++g)
    for (int64_t i = 0; i < plan.call.n_groups; ++i) f(plan.targets[g], plan.adapters[g * plan.call.n_groups + i], plan.groups[i].n);
}

// One buffer for what f(target, adapter, rows) asks for, in floats; `place` gives each adapter its part.
template <class Floats, class Place>
Tensor take_buffer(LoraPlan& plan, const Tensor& like, const Floats& floats, const Place& place) {
  int64_t total = 0;
  for_adapters(plan, [&](const LoraTarget& t, LoraAdapter& a, int64_t n) { total += floats(t, a, n); });
  Tensor buffer = empty(like, {total}, ScalarType::Float);
  float* next = buffer.mutable_data_ptr<float>();
  for_adapters(plan, [&](const LoraTarget& t, LoraAdapter& a, int64_t n) {
    const int64_t size = floats(t, a, n);
    if (size) place(a, next);
    next += size;
  });
  return buffer;
}

}  // namespace

void run_shrink(const LoraPlan& plan) {
  Items items;
  add_row_items(plan, -1, 0, plan.call.D, items);
  run(plan, items, lora_kernels().shrink, false);
}

void make_rows(const LoraPlan& plan, const MakeRows& make) {
  run_items(ceil_div(plan.n_positions, kMadeRows), 0, [&](int64_t i, float*) {
    make(plan.perm + i * kMadeRows, std::min(kMadeRows, plan.n_positions - i * kMadeRows));
  });
}

void run_shrink(const LoraPlan& plan, const MakeRows& make) {
  if (plan.call.slots > 1) {  // the positions of a row lie in several items
    make_rows(plan, make);
    return run_shrink(plan);
  }
  Items items;
  for (int64_t i = 0; i < plan.call.n_groups; ++i)
    for (int64_t row = 0; row < plan.groups[i].n; row += kMadeRows)
      items.push_back({i, -1, row, std::min(row + kMadeRows, plan.groups[i].n), 0, plan.call.D, 0});
  const int64_t n = static_cast<int64_t>(items.size()), unowned = plan.n_positions - plan.n_owned;
  run_items(n + ceil_div(unowned, kMadeRows), lora_kernels().scratch(plan.max_ranks(), plan.call.n_targets), [&](int64_t i, float* scratch) {
    if (i >= n) {
      const int64_t row = (i - n) * kMadeRows;
      return make(plan.perm + plan.n_owned + row, std::min(kMadeRows, unowned - row));
    }
    make(plan.groups[items[i].group].positions + items[i].row0, items[i].row1 - items[i].row0);
    lora_kernels().shrink(plan.call, items[i], scratch);
  });
}

void run_expand(const LoraPlan& plan) {
  Items items;
  const bool in_order = plan.call.slots > 1;
  for (int64_t g = 0; g < plan.call.n_targets; ++g) {
    const int64_t O = plan.targets[g].O, piece = in_order ? piece_cols(O) : std::max<int64_t>(O, 1);
    for (int64_t col = 0; col < O; col += piece) add_row_items(plan, g, col, std::min(O, col + piece), items);
  }
  run(plan, items, lora_kernels().expand, in_order);
}

void run_expand(const LoraPlan& plan, int64_t col0, int64_t col1) {
  Items items;
  add_row_items(plan, 0, col0, col1, items);
  run(plan, items, lora_kernels().expand, false);
}

void run_dx(const LoraPlan& plan, int64_t col0, int64_t col1) {
  Items items;
  add_row_items(plan, -1, col0, col1, items);
  run(plan, items, lora_kernels().backward_x, false);
}

void run_backward_y(LoraPlan& plan, const Tensor& like) {
  const LoraKernels& kernels = lora_kernels();
  for (LoraTarget& t : plan.targets) {
    t.plane_cols = piece_cols(t.O);
    t.planes = ceil_div(t.O, t.plane_cols);
  }
  const Tensor d = take_buffer(
      plan, like, [&](const LoraTarget& t, const LoraAdapter& a, int64_t n) { return a.needs_d ? t.planes * n * kernels.d_stride(a.rank) : 0; },
      [](LoraAdapter& a, float* p) { a.d = p; });
  const auto in_parts = [](const LoraAdapter& a, int64_t n) { return row_groups(n) > 1 && (a.dB.data || a.dbias); };
  const Tensor partial = take_buffer(
      plan, like, [&](const LoraTarget& t, const LoraAdapter& a, int64_t n) { return in_parts(a, n) ? row_groups(n) * a.ranks() * t.O : 0; },
      [](LoraAdapter& a, float* p) { a.partial_B = p; });

  Items items;
  for (int64_t g = 0; g < plan.call.n_targets; ++g)
    add_column_items(plan, g, plan.targets[g].O, items, false, [&](int64_t i) {
      const LoraAdapter& a = plan.targets[g].adapters[i];
      return a.dB.data || a.dbias || (a.needs_d && a.ranks() && plan.groups[i].n);
    });
  run(plan, items, kernels.backward_y, false);
  items.clear();
  add_row_items(plan, -1, 0, 1, items);
  run(plan, items, kernels.finish_d, false);
  run_reduce(plan, kernels.reduce_B, [](const LoraTarget& t, const LoraAdapter& a) { return a.partial_B ? t.O : 0; });
}

void run_backward_x(LoraPlan& plan, const Tensor& like) {
  const Tensor partial = take_buffer(
      plan, like, [&](const LoraTarget&, const LoraAdapter& a, int64_t n) { return row_groups(n) > 1 && a.dA.data ? row_groups(n) * a.rank * plan.call.D : 0; },
      [](LoraAdapter& a, float* p) { a.partial_A = p; });
  const bool in_order = plan.call.slots > 1 && plan.call.dx.data;
  Items items;
  add_column_items(plan, -1, plan.call.D, items, in_order, [&](int64_t i) {
    bool wanted = false;
    for (const LoraTarget& t : plan.targets) wanted = wanted || t.adapters[i].dA.data || (plan.call.dx.data && t.adapters[i].rank && plan.groups[i].n);
    return wanted;
  });
  if (in_order) std::stable_sort(items.begin(), items.end(), [](const LoraItem& a, const LoraItem& b) { return a.col0 < b.col0; });
  run(plan, items, lora_kernels().backward_x, in_order);
  run_reduce(plan, lora_kernels().reduce_A, [&](const LoraTarget&, const LoraAdapter& a) { return a.partial_A ? plan.call.D : 0; });
}

}  // namespace mtk::cpu
