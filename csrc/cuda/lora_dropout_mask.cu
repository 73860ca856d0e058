#include "gpu.h"

namespace {

constexpr int kTileRows = 32;
constexpr int kThreads = 256;

// The adapter that owns row tile `tile`, or n_adapters past the last: the last entry at or below it.
GPU_DEVICE int adapter_of_tile(const int* tiles, int n_adapters, int tile) {
  int low = 0, high = n_adapters;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (tiles[middle] <= tile) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Bytes [blockIdx.y * kThreads, ...) of a tile of positions: a thread draws the 8 columns of one byte, row after row.
__global__ void __launch_bounds__(kThreads)
keep_bits(const int* threshold, const int64_t* seeds, const int* offsets, const int* perm, const int* tiles, const int64_t* step,
          unsigned site, int n_cols, int n_positions, int n_adapters, uint8_t* bits) {
  const int tile = static_cast<int>(blockIdx.x), width = (n_cols + 7) / 8;
  const int byte = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  const int adapter = adapter_of_tile(tiles, n_adapters, tile);
  const int begin = offsets[adapter], first = begin + (tile - tiles[adapter]) * kTileRows;
  const int end = min(adapter < n_adapters ? offsets[adapter + 1] : n_positions, first + kTileRows);
  if (byte >= width) return;
  const unsigned limit = adapter < n_adapters ? static_cast<unsigned>(threshold[adapter]) : 65536u;
  const uint64_t seed = adapter < n_adapters ? static_cast<uint64_t>(seeds[adapter]) : 0;
  const unsigned real = 0xffu >> (byte == width - 1 ? width * 8 - n_cols : 0);
  mtk::DropoutKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, site, static_cast<uint32_t>(*step)};
  for (int j = first; j < end; ++j) {
    key.uid = static_cast<uint32_t>(j - begin);
    const unsigned kept = limit > 0xffffu ? 0u : mtk::dropout_keep_byte(key, static_cast<uint32_t>(byte), limit);
    const int position = perm[j];
    if (static_cast<unsigned>(position) < static_cast<unsigned>(n_positions))
      bits[static_cast<int64_t>(position) * width + byte] = static_cast<uint8_t>(kept & real);
  }
}

}  // namespace

namespace mtk::cuda {

// tiles: the row of group_plan's table for 32 rows; n_tiles: ceil(n_positions / 32) + n_adapters + 1.
const char* launch_lora_dropout_mask(const int* threshold, const int64_t* seeds, const int* offsets, const int* perm, const int* tiles,
                                     const int64_t* step, int64_t site, int n_cols, int n_positions, int n_adapters, int n_tiles,
                                     uint8_t* bits, void* stream) {
  const unsigned columns = (static_cast<unsigned>(n_cols + 7) / 8 + kThreads - 1) / kThreads;
  const dim3 grid(n_positions ? static_cast<unsigned>(n_tiles) : 0u, columns);
  return gpu::launch(keep_bits, grid, kThreads, 0, stream, threshold, seeds, offsets, perm, tiles, step, static_cast<unsigned>(site), n_cols,
                     n_positions, n_adapters, bits);
}

}  // namespace mtk::cuda
