#include "../common/check.h"
#include "lora.h"
#include "lora_run.h"

#include <algorithm>

namespace mtk::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x w^T + bias of one layer, or the sum over layers of dy w.
Tensor base_matmul(const char* name, const Tensors& xs, const Tensors& ws, const OptionalTensor& bias, bool transposed) {
  STD_TORCH_CHECK(!xs.empty() && xs.size() == ws.size(), "got ", xs.size(), " of ", name, " and ", ws.size(), " of w; give one of each per layer");
  std::vector<BasePart> parts;
  BaseCall call = {};
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor &x = xs[i], &w = ws[i];
    STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.scalar_type() == w.scalar_type() && x.size(1) == w.size(transposed ? 1 : 0), name, " is ",
                    describe(x), " and w is ", describe(w), "; give them one dtype and matching sizes");
    check_floating("w", w);
    STD_TORCH_CHECK(i == 0 || (x.scalar_type() == xs[0].scalar_type() && w.size(1) == ws[0].size(1)), "w is ", describe(w), ", the first is ",
                    describe(ws[0]), "; layers of one input have one dtype and width");
    check_rows(name, x, xs[0].size(0), x.size(1));
    check_rows("w", w, w.size(0), w.size(1));
    parts.push_back({x.data_ptr(), w.data_ptr(), x.stride(0), transposed ? 1 : w.stride(0), transposed ? w.stride(0) : 1, x.size(1)});
  }
  const Tensor &x = xs[0], &w = ws[0];
  call.type = call.y_type = element_of(x.scalar_type());
  call.M = x.size(0);
  call.N = w.size(transposed ? 0 : 1);
  call.n_parts = static_cast<int64_t>(parts.size());
  call.parts = parts.data();
  if (bias) check_dense("bias", *bias, {call.N}, {x.scalar_type()});
  Tensor y = empty(x, {call.M, call.N}, x.scalar_type());
  call.bias = bias ? bias->data_ptr() : nullptr;
  call.y = y.mutable_data_ptr();
  call.y_stride = call.N;

  // Equal pieces, in steps of what suits every register tile; shorter, then narrower ones where threads would wait for the last.
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads()), blocks = std::max<int64_t>(1, ceil_div(call.N, kBaseCols));
  const int64_t pieces = std::max(ceil_div(call.M, kBaseRows), std::min(ceil_div(call.M, kBaseRows / 2), ceil_div(8 * threads, blocks)));
  const int64_t rows = pieces ? ceil_div(ceil_div(call.M, pieces), 12) * 12 : 0, row_parts = rows ? ceil_div(call.M, rows) : 0;
  int64_t cols = kBaseCols;
  while (cols > 64 && row_parts * ceil_div(call.N, cols) < 2 * threads) cols /= 2;
  const int64_t col_parts = ceil_div(call.N, cols);
  const BaseKernels& kernels = base_kernels(call.type);
  run_items(row_parts * col_parts, kernels.scratch(), [&](int64_t i, float* scratch) {
    const int64_t row = i % row_parts, col = i / row_parts * cols;
    kernels.tile(call, row * rows, std::min(call.M, (row + 1) * rows), col, std::min(call.N, col + cols), scratch);
  });
  return y;
}

bool detect_fast_16bit(bool fp16) {
#ifdef __x86_64__
  if (!fp16) return has_bf16_dot();
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  return isa_is_free() && isa() == Isa::avx512 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & (1u << 23));  // AVX512-FP16
#else
  (void)fp16;
  return true;
#endif
}

}  // namespace

Tensor lora_base_linear(Tensor x, Tensor w, OptionalTensor bias) { return base_matmul("x", {x}, {w}, bias, true); }

Tensor lora_base_dx(Tensors dys, Tensors ws) { return base_matmul("dy", dys, ws, std::nullopt, false); }

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
