// What the driver asks of one row of logits, per element type; each instruction set fills a table.
#pragma once

#include <cstdint>

namespace mtk::cpu {

// `next` is the row to prefetch; it may lie past the end.
struct CrossEntropyRows {
  float (*max)(const void* x, int64_t n);
  float (*sum_exp)(const void* x, int64_t n, float shift, const void* next);
  void (*softmax)(const void* x, int64_t n, float lse, float scale, void* dx, const void* next);
};

// float32, bfloat16, float16
extern const CrossEntropyRows cross_entropy_generic[3], cross_entropy_avx2[3], cross_entropy_avx512[3];

}  // namespace mtk::cpu
