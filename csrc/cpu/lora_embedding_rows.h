// What the driver asks of the gradient rows of one token, per element type; each instruction set fills a table.
#pragma once

#include <cstdint>

namespace mtk::cpu {

struct EmbeddingRows {
  // out[rank] = sum of the rows ds[places[0..n)], in order, in fp32
  void (*sum)(const void* ds, int64_t stride, const int64_t* places, int64_t n, int64_t rank, float* out);
};

// float32, bfloat16, float16
extern const EmbeddingRows embedding_generic[3], embedding_avx2[3], embedding_avx512[3];

}  // namespace mtk::cpu
