// Table of contents: every raw kernel under torch.ops.mtkernels_C. Schemas users see live in mtkernels/ops.
#include "mtkernels.h"

#include <torch/csrc/stable/library.h>

using namespace mtk;

STABLE_TORCH_LIBRARY(mtkernels_C, m) {
  m.def("group_plan(Tensor ids, int n_groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lora_shrink_fwd(Tensor x, Tensor[] A, Tensor[] threshold, Tensor[] seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step,"
      " int[] sites, bool dropout, Tensor(a!)? bits=None) -> Tensor");
  m.def(
      "lora_shrink_bwd(Tensor ds, Tensor x, Tensor[] A, Tensor[] threshold, Tensor[] seeds, Tensor offsets, Tensor perm, Tensor tiles,"
      " Tensor step, int[] sites, bool dropout, Tensor(a!)? dx, Tensor(b!)[] dA, Tensor? bits=None) -> ()");
  m.def(
      "lora_expand_fwd(Tensor s, Tensor[] B, Tensor[] bias, Tensor[] scale, Tensor? gates, Tensor offsets, Tensor perm, Tensor tiles,"
      " Tensor(a!)[] ys) -> ()");
  m.def(
      "lora_expand_bwd(Tensor[] dys, Tensor s, Tensor[] B, Tensor[] bias, Tensor[] scale, Tensor? gates, Tensor offsets, Tensor perm,"
      " Tensor tiles, Tensor(a!) ds, Tensor(b!)? e, Tensor(c!)[] dB, Tensor(d!)[] dbias) -> ()");
  m.def(
      "lora_fwd(Tensor x, Tensor[] A, Tensor[] B, Tensor[] bias, Tensor[] scale, Tensor[] threshold, Tensor[] seeds, Tensor? gates,"
      " Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int[] sites, bool dropout, Tensor(a!)[] ys,"
      " Tensor(b!)? bits=None) -> Tensor");
  m.def(
      "lora_bwd(Tensor[] dys, Tensor x, Tensor s, Tensor[] A, Tensor[] B, Tensor[] bias, Tensor[] scale, Tensor[] threshold,"
      " Tensor[] seeds, Tensor? gates, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int[] sites, bool dropout,"
      " Tensor(a!)? dx, Tensor(b!)? e, Tensor(c!)[] dA, Tensor(d!)[] dB, Tensor(e!)[] dbias,"
      " Tensor? bits=None) -> ()");
  m.def(
      "rmsnorm_lora_shrink_fwd(Tensor x, Tensor gamma, float eps, float offset, bool round_first, Tensor[] A, Tensor[] threshold,"
      " Tensor[] seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int[] sites, bool dropout,"
      " Tensor(a!)? bits=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rmsnorm_lora_shrink_bwd(Tensor dxn, Tensor ds, Tensor x, Tensor gamma, Tensor rstd, Tensor s, float offset, bool round_first,"
      " Tensor[] A, Tensor[] threshold, Tensor[] seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int[] sites, bool dropout,"
      " Tensor(a!)? dx, Tensor(b!)? dgamma, Tensor(c!)[] dA, Tensor? bits=None) -> ()");
  m.def(
      "swiglu_lora_shrink_fwd(Tensor gate, Tensor up, int act, Tensor[] A, Tensor[] threshold, Tensor[] seeds, Tensor offsets, Tensor perm,"
      " Tensor tiles, Tensor step, int[] sites, bool dropout, Tensor(a!)? bits=None) -> (Tensor, Tensor)");
  m.def(
      "swiglu_lora_shrink_bwd(Tensor dh, Tensor ds, Tensor gate, Tensor up, int act, Tensor[] A, Tensor[] threshold, Tensor[] seeds,"
      " Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int[] sites, bool dropout, Tensor(a!)? dgate, Tensor(b!)? dup,"
      " Tensor(c!)[] dA, Tensor? bits=None) -> ()");
  m.def(
      "moe_lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor[] A, Tensor[] B, Tensor[] lora_bias, Tensor scale, Tensor threshold,"
      " Tensor seeds, Tensor? gates, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int site, bool dropout,"
      " Tensor(a!)? bits=None) -> (Tensor, Tensor)");
  m.def(
      "moe_lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor[] A, Tensor[] B, Tensor[] lora_bias,"
      " Tensor scale, Tensor threshold, Tensor seeds, Tensor? gates, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int site,"
      " bool dropout, Tensor(a!)? dx, Tensor(b!)? dgates, Tensor(c!)? e, Tensor(d!)[] dA, Tensor(e!)[] dB, Tensor(f!)[] dbias,"
      " Tensor? bits=None) -> ()");
  m.def("lora_base_linear(Tensor x, Tensor w, Tensor? bias) -> Tensor");
  m.def("lora_base_dx(Tensor[] dys, Tensor[] ws) -> Tensor");
  m.def("cpu_has_fast_mkl() -> bool");
  m.def("cpu_has_fast_16bit(bool fp16) -> bool");
  m.def("lora_embedding_fwd(Tensor token, Tensor[] A, Tensor ids, Tensor offsets, Tensor perm, Tensor tiles, Tensor(a!) s) -> ()");
  m.def(
      "lora_embedding_bwd(Tensor ds, Tensor token, int padding, Tensor ids, Tensor offsets, Tensor perm, Tensor tiles,"
      " Tensor(a!)[] dA) -> ()");
  m.def(
      "lora_dropout_mask(Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int site, int n_cols)"
      " -> Tensor");
  m.def("dora_norm(Tensor weight, Tensor[] A, Tensor[] B, Tensor scale) -> Tensor");
  m.def(
      "dora_dropout(Tensor x, Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int site)"
      " -> Tensor");
  m.def("dora_fwd(Tensor z, Tensor? base, Tensor scale, Tensor ids) -> Tensor");
  m.def(
      "dora_bwd(Tensor dy, Tensor? z, Tensor scale, Tensor ids, Tensor offsets, Tensor perm, Tensor tiles) -> (Tensor, Tensor)");
  m.def("task_reduce_fwd(Tensor values, Tensor? coef, Tensor offsets, Tensor perm, Tensor tiles) -> Tensor");
  m.def("task_reduce_bwd(Tensor dsums, Tensor values, Tensor? coef, Tensor ids) -> (Tensor, Tensor)");
  m.def("task_cross_entropy_fwd(Tensor logits, Tensor target, Tensor ids, int ignore_index) -> (Tensor, Tensor)");
  m.def("task_cross_entropy_bwd(Tensor dnll, Tensor logits, Tensor target, Tensor ids, Tensor lse, int ignore_index)"
        " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mtkernels_C, CPU, m) {
  m.impl("group_plan", TORCH_BOX(&cpu::group_plan));
  m.impl("lora_shrink_fwd", TORCH_BOX(&cpu::lora_shrink_fwd));
  m.impl("lora_shrink_bwd", TORCH_BOX(&cpu::lora_shrink_bwd));
  m.impl("lora_expand_fwd", TORCH_BOX(&cpu::lora_expand_fwd));
  m.impl("lora_expand_bwd", TORCH_BOX(&cpu::lora_expand_bwd));
  m.impl("lora_fwd", TORCH_BOX(&cpu::lora_fwd));
  m.impl("lora_bwd", TORCH_BOX(&cpu::lora_bwd));
  m.impl("rmsnorm_lora_shrink_fwd", TORCH_BOX(&cpu::rmsnorm_lora_shrink_fwd));
  m.impl("rmsnorm_lora_shrink_bwd", TORCH_BOX(&cpu::rmsnorm_lora_shrink_bwd));
  m.impl("swiglu_lora_shrink_fwd", TORCH_BOX(&cpu::swiglu_lora_shrink_fwd));
  m.impl("swiglu_lora_shrink_bwd", TORCH_BOX(&cpu::swiglu_lora_shrink_bwd));
  m.impl("moe_lora_linear_fwd", TORCH_BOX(&cpu::moe_lora_linear_fwd));
  m.impl("moe_lora_linear_bwd", TORCH_BOX(&cpu::moe_lora_linear_bwd));
  m.impl("lora_base_linear", TORCH_BOX(&cpu::lora_base_linear));
  m.impl("lora_base_dx", TORCH_BOX(&cpu::lora_base_dx));
  m.impl("lora_embedding_fwd", TORCH_BOX(&cpu::lora_embedding_fwd));
  m.impl("lora_embedding_bwd", TORCH_BOX(&cpu::lora_embedding_bwd));
  m.impl("lora_dropout_mask", TORCH_BOX(&cpu::lora_dropout_mask));
  m.impl("dora_norm", TORCH_BOX(&cpu::dora_norm));
  m.impl("dora_dropout", TORCH_BOX(&cpu::dora_dropout));
  m.impl("dora_fwd", TORCH_BOX(&cpu::dora_fwd));
  m.impl("dora_bwd", TORCH_BOX(&cpu::dora_bwd));
  m.impl("task_reduce_fwd", TORCH_BOX(&cpu::task_reduce_fwd));
  m.impl("task_reduce_bwd", TORCH_BOX(&cpu::task_reduce_bwd));
  m.impl("task_cross_entropy_fwd", TORCH_BOX(&cpu::task_cross_entropy_fwd));
  m.impl("task_cross_entropy_bwd", TORCH_BOX(&cpu::task_cross_entropy_bwd));
}

// No tensor to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(mtkernels_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_has_fast_mkl", TORCH_BOX(&cpu::cpu_has_fast_mkl));
  m.impl("cpu_has_fast_16bit", TORCH_BOX(&cpu::cpu_has_fast_16bit));
}

#ifdef MTKERNELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(mtkernels_C, CUDA, m) {
  m.impl("lora_dropout_mask", TORCH_BOX(&cuda::lora_dropout_mask));
  m.impl("task_reduce_fwd", TORCH_BOX(&cuda::task_reduce_fwd));
  m.impl("task_reduce_bwd", TORCH_BOX(&cuda::task_reduce_bwd));
}
#endif
