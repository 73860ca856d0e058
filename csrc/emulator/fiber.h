// A fiber switch that ASan and TSan follow.
#pragma once

namespace emu {

struct Fiber;

void start_host();                           // remembers the host's stack and TSan context
void prepare_fiber(Fiber* fiber);            // gives it a stack whose first switch enters run_thread()
void retire_fiber(Fiber* fiber);
void switch_to(Fiber* fiber);                // host -> fiber, until the fiber switches back
void switch_to_host(Fiber* fiber);
void fiber_entered();                        // first thing on a fresh stack
[[noreturn]] void run_thread();              // the scheduler's; never returns

}  // namespace emu
