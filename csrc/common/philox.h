#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MTK_HOST_DEVICE __host__ __device__
#else
#define MTK_HOST_DEVICE
#endif

namespace mtk {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kDropoutRounds = 7;
// One Philox call decides this many consecutive columns, one 16-bit lane each.
constexpr int kDropoutLanes = 8;

// What fixes a row's dropout mask; the column block k / 8 is the remaining counter word.
struct DropoutKey {
  uint32_t key0, key1;
  uint32_t uid, site, step;
};

template <int kRounds>
MTK_HOST_DEVICE inline void philox4x32(uint32_t key0, uint32_t key1, uint32_t counter[4]) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxMul0} * counter[0];
    const uint64_t p1 = uint64_t{kPhiloxMul1} * counter[2];
    const uint32_t c1 = counter[1], c3 = counter[3];
    counter[0] = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    counter[1] = static_cast<uint32_t>(p1);
    counter[2] = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    counter[3] = static_cast<uint32_t>(p0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// Bit l of the result: column 8 * block + l is kept.
MTK_HOST_DEVICE inline uint8_t dropout_keep_byte(const DropoutKey& key, uint32_t block, uint32_t threshold) {
  uint32_t words[4] = {block, key.uid, key.site, key.step};
  philox4x32<kDropoutRounds>(key.key0, key.key1, words);
  uint32_t keep = 0;
  for (int l = 0; l < kDropoutLanes; ++l) {
    const uint32_t lane = (words[l / 2] >> (16 * (l % 2))) & 0xffffu;
    keep |= static_cast<uint32_t>(lane >= threshold) << l;
  }
  return static_cast<uint8_t>(keep);
}

}  // namespace mtk
