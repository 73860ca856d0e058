#include "../common/check.h"
#include "lora.h"
#include "lora_run.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>

namespace mtk::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor base_matmul(const char* name, const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, bool transposed) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.scalar_type() == w.scalar_type() && x.size(1) == w.size(transposed ? 1 : 0), name,
                  " is ", describe(x), " and w is ", describe(w), "; give them one dtype and matching sizes");
  check_floating("w", w);
  check_rows(name, x, x.size(0), x.size(1));
  check_rows("w", w, w.size(0), w.size(1));
  BaseCall call = {};
  call.type = element_of(x.scalar_type());
  call.M = x.size(0);
  call.K = x.size(1);
  call.N = w.size(transposed ? 0 : 1);
  if (bias) check_dense("bias", *bias, {call.N}, {x.scalar_type()});
  Tensor y = empty(x, {call.M, call.N}, x.scalar_type());
  call.x = x.data_ptr();
  call.w = w.data_ptr();
  call.bias = bias ? bias->data_ptr() : nullptr;
  call.x_stride = x.stride(0);
  call.k_stride = transposed ? 1 : w.stride(0);
  call.n_stride = transposed ? w.stride(0) : 1;
  call.y = y.mutable_data_ptr();

  // Equal pieces, in steps of what suits every register tile.
  const int64_t pieces = std::max<int64_t>(1, ceil_div(call.M, kBaseRows)), rows = ceil_div(ceil_div(call.M, pieces), 12) * 12;
  const int64_t row_parts = rows ? ceil_div(call.M, rows) : 0, col_parts = ceil_div(call.N, kBaseCols);
  const LoraKernels& kernels = lora_kernels();
  run_items(row_parts * col_parts, kernels.base_scratch(), [&](int64_t i, float* scratch) {
    const int64_t row = i % row_parts, col = i / row_parts * kBaseCols;
    kernels.base(call, row * rows, std::min(call.M, (row + 1) * rows), col, std::min(call.N, col + kBaseCols), scratch);
  });
  return y;
}

bool detect_fast_16bit(bool fp16) {
#ifdef __x86_64__
  const char* forced = std::getenv("MTKERNELS_CPU_ISA");
  if ((forced && *forced) || isa() != Isa::avx512) return false;
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (fp16) return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & (1u << 23));  // AVX512-FP16
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));             // AVX512-BF16
#else
  (void)fp16;
  return true;
#endif
}

}  // namespace

Tensor lora_base_linear(Tensor x, Tensor w, std::optional<Tensor> bias) { return base_matmul("x", x, w, bias, true); }

Tensor lora_base_dx(Tensor dy, Tensor w) { return base_matmul("dy", dy, w, std::nullopt, false); }

bool cpu_has_fast_mkl() {
#ifdef MTK_X86_KERNELS
  return isa() != Isa::avx512 || __builtin_cpu_is("intel");
#else
  return true;
#endif
}

bool cpu_has_fast_16bit(bool fp16) {
  static const bool fast[2] = {detect_fast_16bit(false), detect_fast_16bit(true)};
  return fast[fp16];
}

}  // namespace mtk::cpu
