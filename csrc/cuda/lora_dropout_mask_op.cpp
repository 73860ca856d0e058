#include "../common/cuda.h"
#include "../mtkernels.h"

#include <limits>

namespace mtk::cuda {

// Defined in lora_dropout_mask.cu, which knows no torch.
const char* launch_lora_dropout_mask(const int* threshold, const int64_t* seeds, const int* offsets, const int* perm, const int* tiles,
                                     const int64_t* step, int64_t site, int n_cols, int n_positions, int n_adapters, int n_tiles,
                                     uint8_t* bits, void* stream);

namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kTileSizes = 5, kTile = 1;  // TILE_ROWS[1] == kTileRows
constexpr int64_t kMaxColumns = 65535LL * 256 * 8;  // a grid's second dimension, a block's bytes, a byte's columns

}  // namespace

Tensor lora_dropout_mask(Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int64_t site, int64_t n_cols) {
  const int64_t n = threshold.numel(), n_positions = perm.numel(), n_tiles = (n_positions + kTileRows - 1) / kTileRows + n + 1;
  STD_TORCH_CHECK(n_cols >= 0 && n_cols <= kMaxColumns, "n_cols is ", n_cols, "; 0 to ", kMaxColumns, " are supported");
  STD_TORCH_CHECK(n_positions < std::numeric_limits<int32_t>::max() - kTileRows, "perm has ", n_positions,
                  " positions; fewer than 2^31 - 32 are supported");
  for (const auto& [name, t] : {std::pair{"seeds", &seeds}, {"offsets", &offsets}, {"perm", &perm}, {"tiles", &tiles}, {"step", &step}})
    check_cuda(name, *t, threshold);
  check_dense("threshold", threshold, {n}, {ScalarType::Int});
  check_dense("seeds", seeds, {n}, {ScalarType::Long});
  check_dense("offsets", offsets, {n + 1}, {ScalarType::Int});
  check_dense("perm", perm, {n_positions}, {ScalarType::Int});
  check_dense("tiles", tiles, {kTileSizes, n + 1}, {ScalarType::Int});
  check_dense("step", step, {}, {ScalarType::Long});

  const CudaScope scope(threshold);
  Tensor bits = empty(perm, {n_positions, (n_cols + 7) / 8}, ScalarType::Byte);
  check_launch("lora_dropout_mask",
               launch_lora_dropout_mask(threshold.const_data_ptr<int32_t>(), seeds.const_data_ptr<int64_t>(), offsets.const_data_ptr<int32_t>(),
                                        perm.const_data_ptr<int32_t>(), tiles.const_data_ptr<int32_t>() + kTile * (n + 1),
                                        step.const_data_ptr<int64_t>(), site, static_cast<int>(n_cols), static_cast<int>(n_positions),
                                        static_cast<int>(n), static_cast<int>(n_tiles), static_cast<uint8_t*>(bits.data_ptr()), scope.stream()));
  return bits;
}

}  // namespace mtk::cuda
