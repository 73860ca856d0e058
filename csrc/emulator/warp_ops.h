// Barriers, shuffles, votes, matches and reductions.
#pragma once

#include <type_traits>

#include "runtime.h"

#define GPU_SITE emu::Site site = emu::Site::here()

namespace emu {

GPU_DEVICE int lane() { return current->lane; }

template <class T>
GPU_DEVICE T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= Lanes::kBytes, "too large for a shuffle");
  return warp_meet(mask, WarpOp::shuffle, &value, sizeof value).template get<T>(source);
}

template <class T, class F>
GPU_DEVICE T reduce(unsigned mask, T value, F combine) {
  const Lanes& lanes = warp_meet(mask, WarpOp::reduce, &value, sizeof value);
  T result{};
  bool first = true;
  for (int i = 0; i < 32; i++) {
    if (!(lanes.mask >> i & 1)) continue;
    result = first ? lanes.get<T>(i) : combine(result, lanes.get<T>(i));
    first = false;
  }
  return result;
}

}  // namespace emu

GPU_DEVICE void __syncthreads(GPU_SITE) { emu::block_barrier(emu::Vote::none, 0, site); }
GPU_DEVICE int __syncthreads_count(int p, GPU_SITE) { return emu::block_barrier(emu::Vote::count, p, site); }
GPU_DEVICE int __syncthreads_and(int p, GPU_SITE) { return emu::block_barrier(emu::Vote::all, p, site); }
GPU_DEVICE int __syncthreads_or(int p, GPU_SITE) { return emu::block_barrier(emu::Vote::any, p, site); }
GPU_DEVICE void __syncwarp(unsigned mask = ~0u) { emu::warp_meet(mask, emu::WarpOp::sync, nullptr, 0); }
GPU_DEVICE unsigned __activemask() { return emu::active_lanes(); }

template <class T>
GPU_DEVICE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emu::shuffle(mask, value, (emu::lane() & ~(width - 1)) | (source & (width - 1)));
}

template <class T>
GPU_DEVICE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = emu::lane() - static_cast<int>(delta);
  return emu::shuffle(mask, value, source < (emu::lane() & ~(width - 1)) ? emu::lane() : source);
}

template <class T>
GPU_DEVICE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = emu::lane() + static_cast<int>(delta);
  return emu::shuffle(mask, value, source > (emu::lane() | (width - 1)) ? emu::lane() : source);
}

template <class T>
GPU_DEVICE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int source = emu::lane() ^ bits;
  return emu::shuffle(mask, value, source > (emu::lane() | (width - 1)) ? emu::lane() : source & 31);
}

GPU_DEVICE unsigned __ballot_sync(unsigned mask, int p) {
  const emu::Lanes& lanes = emu::warp_meet(mask, emu::WarpOp::ballot, &p, sizeof p);
  unsigned result = 0;
  for (int i = 0; i < 32; i++)
    if ((lanes.mask >> i & 1) && lanes.get<int>(i)) result |= 1u << i;
  return result;
}

GPU_DEVICE int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
GPU_DEVICE int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }

template <class T>
GPU_DEVICE unsigned __match_any_sync(unsigned mask, T value) {
  const emu::Lanes& lanes = emu::warp_meet(mask, emu::WarpOp::match, &value, sizeof value);
  unsigned result = 0;
  for (int i = 0; i < 32; i++)
    if ((lanes.mask >> i & 1) && lanes.get<T>(i) == value) result |= 1u << i;
  return result;
}

template <class T>
GPU_DEVICE unsigned __match_all_sync(unsigned mask, T value, int* all) {
  const emu::Lanes& lanes = emu::warp_meet(mask, emu::WarpOp::match, &value, sizeof value);
  *all = 1;
  for (int i = 0; i < 32; i++)
    if ((lanes.mask >> i & 1) && lanes.get<T>(i) != value) *all = 0;
  return *all ? lanes.mask : 0;
}

template <class T>
GPU_DEVICE T __reduce_add_sync(unsigned mask, T value) {
  return emu::reduce(mask, value, [](T a, T b) { return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)); });
}
template <class T>
GPU_DEVICE T __reduce_min_sync(unsigned mask, T value) {
  return emu::reduce(mask, value, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
GPU_DEVICE T __reduce_max_sync(unsigned mask, T value) {
  return emu::reduce(mask, value, [](T a, T b) { return a > b ? a : b; });
}
GPU_DEVICE unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emu::reduce(mask, value, [](unsigned a, unsigned b) { return a & b; });
}
GPU_DEVICE unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emu::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
GPU_DEVICE unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return emu::reduce(mask, value, [](unsigned a, unsigned b) { return a ^ b; });
}
