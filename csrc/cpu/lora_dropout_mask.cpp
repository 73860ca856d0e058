#include "../common/check.h"
#include "../common/philox.h"
#include "../mtkernels.h"
#include "lora_run.h"

#include <algorithm>
#include <cstring>

namespace mtk::cpu {

// Bytes of a thread's share at least.
constexpr int64_t kGrainBytes = 4096;

Tensor lora_dropout_mask(Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor, Tensor step, int64_t site, int64_t n_cols) {
  const int64_t n = threshold.numel(), n_positions = perm.numel(), width = (n_cols + 7) / 8;
  STD_TORCH_CHECK(n_cols >= 0, "n_cols is ", n_cols, "; give a number of columns");
  check_plan(offsets, perm, n, n_positions);
  check_dense("threshold", threshold, {n}, {ScalarType::Int});
  check_dense("seeds", seeds, {n}, {ScalarType::Long});
  check_dense("step", step, {}, {ScalarType::Long});
  const int32_t* bounds = offsets.const_data_ptr<int32_t>();
  const int32_t* positions = perm.const_data_ptr<int32_t>();
  Tensor bits = empty(perm, {n_positions, width}, ScalarType::Byte);
  uint8_t* bits_p = static_cast<uint8_t*>(bits.data_ptr());
  if (width == 0) return bits;
  const LoraKernels& kernels = lora_kernels();
  torch::stable::parallel_for(0, n_positions, std::max<int64_t>(1, kGrainBytes / width), [&](int64_t first, int64_t last) {
    int64_t adapter = std::upper_bound(bounds, bounds + n + 1, first) - bounds - 1;
    for (int64_t j = first; j < last; ++j) {
      while (adapter < n && j >= bounds[adapter + 1]) ++adapter;
      uint8_t* row = bits_p + positions[j] * width;
      if (adapter >= n) {
        std::memset(row, 0, static_cast<size_t>(width));
        continue;
      }
      const uint64_t seed = static_cast<uint64_t>(seeds.const_data_ptr<int64_t>()[adapter]);
      const uint32_t limit = static_cast<uint32_t>(std::clamp(threshold.const_data_ptr<int32_t>()[adapter], 0, 65536));
      const DropoutKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(j - bounds[adapter]),
                              static_cast<uint32_t>(site), static_cast<uint32_t>(*step.const_data_ptr<int64_t>())};
      kernels.keep_row(key, limit, n_cols, row);
    }
  });
  return bits;
}

}  // namespace mtk::cpu
