#include "fiber.h"

#include "state.h"

#if !defined(__x86_64__)
#error "the CUDA emulator's fiber switch is written for x86-64"
#endif

extern "C" void emu_switch(void** save, void* to);

// Saves the callee-saved registers on the old stack and takes those of the new one.
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");

namespace emu {
namespace {

constexpr unsigned kNoSync = 1;  // TSan: switching orders nothing

struct Host {
  void* sp;
  void* tsan_fiber;
  void* fake_stack;
  const void* stack;
  size_t stack_bytes;
} host;

}  // namespace

void start_host() { host.tsan_fiber = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr; }

void prepare_fiber(Fiber* fiber) {
  fiber->stack = map_stack();
  void** sp = reinterpret_cast<void**>(fiber->stack + kStackBytes);
  *--sp = nullptr;  // run_thread's return address: aligns its stack
  *--sp = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  fiber->sp = sp;
  fiber->fake_stack = nullptr;
  fiber->tsan_fiber = under_tsan() ? __tsan_create_fiber(0) : nullptr;
}

void retire_fiber(Fiber* fiber) {
  if (fiber->tsan_fiber) __tsan_destroy_fiber(fiber->tsan_fiber);
  unmap_stack(fiber->stack);
}

void switch_to(Fiber* fiber) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&host.fake_stack, fiber->stack, kStackBytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber->tsan_fiber, kNoSync);
  emu_switch(&host.sp, fiber->sp);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(host.fake_stack, nullptr, nullptr);
}

void switch_to_host(Fiber* fiber) {
  void** keep = fiber->done ? nullptr : &fiber->fake_stack;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(keep, host.stack, host.stack_bytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(host.tsan_fiber, kNoSync);
  emu_switch(&fiber->sp, host.sp);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
}

void fiber_entered() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &host.stack, &host.stack_bytes);
}

}  // namespace emu
