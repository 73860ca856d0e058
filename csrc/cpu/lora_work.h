// How a call is cut into items, and the passes that run them.
#pragma once

#include "lora_call.h"

#include <functional>

namespace mtk::cpu {

// Makes the rows of n positions, on any thread.
using MakeRows = std::function<void(const int32_t* positions, int64_t n)>;

// S of every owned position.
void run_shrink(const LoraPlan& plan);
// The same where x is yet to be made: each item makes its rows and reads them from cache. Rows of no adapter are made too.
void run_shrink(const LoraPlan& plan, const MakeRows& make);
// Every row, once: that of each position, or of each row's first position where there are several.
void make_rows(const LoraPlan& plan, const MakeRows& make);
// Adds every adapter's part to the ys.
void run_expand(const LoraPlan& plan);
// The same in columns [col0, col1) of the one target of a plan with one position a row.
void run_expand(const LoraPlan& plan, int64_t col0, int64_t col1);
// ds and e of the adapters that need them, the gradients of B and bias. Uses `like` to allocate.
void run_backward_y(LoraPlan& plan, const Tensor& like);
// The gradients of A; adds to dx.
void run_backward_x(LoraPlan& plan, const Tensor& like);
// The latter alone, in columns [col0, col1), for a plan with one position a row and no dA.
void run_dx(const LoraPlan& plan, int64_t col0, int64_t col1);

}  // namespace mtk::cpu
