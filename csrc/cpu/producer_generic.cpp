#include "isa.h"
#include "lora_items.h"
#include "producer_kernels.h"

namespace mtk::cpu {

const ProducerRows producer_generic[3] = {generic::producer<float>, generic::producer<bf16>, generic::producer<f16>};

const ProducerRows& producer_rows(Element type) {
  const ProducerRows* table = producer_generic;
#ifdef MTK_X86_KERNELS
  if (isa() == Isa::avx2) table = producer_avx2;
  if (isa() == Isa::avx512) table = producer_avx512;
#endif
  return table[static_cast<int>(type)];
}

}  // namespace mtk::cpu
