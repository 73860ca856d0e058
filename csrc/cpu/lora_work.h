// How a call is cut into items, and the passes that run them.
#pragma once

#include "lora_call.h"

namespace mtk::cpu {

// S of every owned position.
void run_shrink(const LoraPlan& plan);
// Adds every adapter's part to the ys.
void run_expand(const LoraPlan& plan);
// ds and e of the adapters that need them, the gradients of B and bias. Uses `like` to allocate.
void run_backward_y(LoraPlan& plan, const Tensor& like);
// The gradients of A; adds to dx.
void run_backward_x(LoraPlan& plan, const Tensor& like);

}  // namespace mtk::cpu
