// LoRA entry points; arguments and formulas as in mtkernels/reference. Lists of factors run target by target.
#pragma once

#include "lora_call.h"

#include <tuple>

namespace mtk::cpu {

// S [positions, sum of the targets' largest ranks]. bits, here and below: keep bits uint8 [positions, targets, ceil(D / 8)], which a
// forward fills and a backward reads in place of drawing the masks; none = drawn again.
Tensor lora_shrink_fwd(Tensor x, Tensors A, Tensors threshold, Tensors seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step,
                       Ints sites, bool dropout, OptionalTensor bits);
// Adds to dx, if given; writes every dA that is not empty.
void lora_shrink_bwd(Tensor ds, Tensor x, Tensors A, Tensors threshold, Tensors seeds, Tensor offsets, Tensor perm, Tensor tiles,
                     Tensor step, Ints sites, bool dropout, OptionalTensor dx, Tensors dA, OptionalTensor bits);

// Adds to ys.
void lora_expand_fwd(Tensor s, Tensors B, Tensors bias, Tensors scale, OptionalTensor gates, Tensor offsets, Tensor perm, Tensor tiles,
                     Tensors ys);
// Writes ds, e if given, and every dB and dbias that is not empty.
void lora_expand_bwd(Tensors dys, Tensor s, Tensors B, Tensors bias, Tensors scale, OptionalTensor gates, Tensor offsets, Tensor perm,
                     Tensor tiles, Tensor ds, OptionalTensor e, Tensors dB, Tensors dbias);

// Both halves. The backward keeps dS in float32 and reads x only for a dA that is wanted.
Tensor lora_fwd(Tensor x, Tensors A, Tensors B, Tensors bias, Tensors scale, Tensors threshold, Tensors seeds, OptionalTensor gates,
                Tensor offsets, Tensor perm, Tensor tiles, Tensor step, Ints sites, bool dropout, Tensors ys, OptionalTensor bits);
void lora_bwd(Tensors dys, Tensor x, Tensor s, Tensors A, Tensors B, Tensors bias, Tensors scale, Tensors threshold, Tensors seeds,
              OptionalTensor gates, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, Ints sites, bool dropout, OptionalTensor dx,
              OptionalTensor e, Tensors dA, Tensors dB, Tensors dbias, OptionalTensor bits);

// x normalised, its S, and 1 / rms [T]. The backward writes dx and dgamma, if given, and every dA that is not empty.
std::tuple<Tensor, Tensor, Tensor> rmsnorm_lora_shrink_fwd(Tensor x, Tensor gamma, double eps, double offset, bool round_first, Tensors A,
                                                           Tensors threshold, Tensors seeds, Tensor offsets, Tensor perm, Tensor tiles,
                                                           Tensor step, Ints sites, bool dropout, OptionalTensor bits);
void rmsnorm_lora_shrink_bwd(Tensor dxn, Tensor ds, Tensor x, Tensor gamma, Tensor rstd, Tensor s, double offset, bool round_first, Tensors A,
                             Tensors threshold, Tensors seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, Ints sites,
                             bool dropout, OptionalTensor dx, OptionalTensor dgamma, Tensors dA, OptionalTensor bits);
// act(gate) up and its S; act: index in mtkernels/reference/swiglu_lora_shrink.py. The backward writes dgate and dup, if given, and the dA.
std::tuple<Tensor, Tensor> swiglu_lora_shrink_fwd(Tensor gate, Tensor up, int64_t act, Tensors A, Tensors threshold, Tensors seeds,
                                                  Tensor offsets, Tensor perm, Tensor tiles, Tensor step, Ints sites, bool dropout,
                                                  OptionalTensor bits);
void swiglu_lora_shrink_bwd(Tensor dh, Tensor ds, Tensor gate, Tensor up, int64_t act, Tensors A, Tensors threshold, Tensors seeds,
                            Tensor offsets, Tensor perm, Tensor tiles, Tensor step, Ints sites, bool dropout, OptionalTensor dgate,
                            OptionalTensor dup, Tensors dA, OptionalTensor bits);

// (y, S) of the experts' layers, and the gradients; see mtkernels/reference/moe_lora_linear.py. Of one (expert, adapter) each, with one of
// rank 0 behind every expert's: A, B, lora_bias, dA, dB, dbias.
std::tuple<Tensor, Tensor> moe_lora_linear_fwd(Tensor x, Tensor weight, OptionalTensor bias, Tensors A, Tensors B, Tensors lora_bias, Tensor scale,
                                               Tensor threshold, Tensor seeds, OptionalTensor gates, Tensor offsets, Tensor perm, Tensor tiles,
                                               Tensor step, int64_t site, bool dropout, OptionalTensor bits);
void moe_lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, OptionalTensor bias, Tensor s, Tensors A, Tensors B, Tensors lora_bias, Tensor scale,
                         Tensor threshold, Tensor seeds, OptionalTensor gates, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int64_t site,
                         bool dropout, OptionalTensor dx, OptionalTensor dgates, OptionalTensor e, Tensors dA, Tensors dB, Tensors dbias,
                         OptionalTensor bits);

// The shared frozen layer in a fixed order of operations, float32 or 16-bit: x w^T + bias, and the sum over layers of dy w.
Tensor lora_base_linear(Tensor x, Tensor w, OptionalTensor bias);
Tensor lora_base_dx(Tensors dys, Tensors ws);

// Whether MKL's float32 matmul runs on the vectors our kernels would use: it takes AVX-512 on Intel's processors only.
bool cpu_has_fast_mkl();

// Whether matmul in torch is fast for bfloat16 (or float16) on this CPU. False whenever MTKERNELS_CPU_ISA is set.
bool cpu_has_fast_16bit(bool fp16);

}  // namespace mtk::cpu
