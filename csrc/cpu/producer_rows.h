// What the drivers of rmsnorm_lora_shrink and swiglu_lora_shrink ask of one row, per element type; each instruction set fills a table.
#pragma once

#include "../common/element.h"

#include <cstdint>

namespace mtk::cpu {

struct ProducerRows {
  // xn = w x / rms, and 1 / rms; round_first rounds x / rms to the element type before w multiplies it.
  float (*rmsnorm)(const void* x, const float* w, int64_t n, float eps, bool round_first, void* xn);
  // The same from a known 1 / rms.
  void (*normalize)(const void* x, const float* w, int64_t n, float rstd, bool round_first, void* xn);
  // dxn becomes dx unless `keep`; adds to dgamma [n] unless null.
  void (*rmsnorm_bwd)(const void* x, const float* w, int64_t n, float rstd, bool round_first, bool keep, void* dxn, float* dgamma);
  // h = act(gate) up
  void (*gate)(const void* gate, const void* up, int64_t n, bool tanh_gelu, void* h);
  // dh becomes dgate.
  void (*gate_bwd)(const void* gate, const void* up, int64_t n, bool tanh_gelu, void* dh, void* dup);
};

// float32, bfloat16, float16
extern const ProducerRows producer_generic[3], producer_avx2[3], producer_avx512[3];

const ProducerRows& producer_rows(Element type);

}  // namespace mtk::cpu
