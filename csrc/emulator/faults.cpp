#include "faults.h"

#include <ucontext.h>

#include <cstdlib>

#include "state.h"

namespace emu {
namespace {

const void* fault_pc;
const void* fault_address;

void report_fault() {
  const auto address = reinterpret_cast<uintptr_t>(fault_address);
  const auto stack = reinterpret_cast<uintptr_t>(running->stack);
  if (stack - 4096 <= address && address < stack + 4096)
    fail(make_finding("stack-overflow", {fault_pc}, "%s needs more than 256 KiB of stack", name_of(running).text));
  fail(make_finding("out-of-bounds", {fault_pc}, "illegal memory access by %s", name_of(running).text));
}

// The thread is lost, so its stack is free to report from.
void handle(int signal, siginfo_t* info, void* raw) {
  if (!running) {
    ::signal(signal, SIG_DFL);
    return;
  }
  auto* registers = static_cast<ucontext_t*>(raw)->uc_mcontext.gregs;
  // One past: findings hold return addresses.
  fault_pc = reinterpret_cast<const void*>(registers[REG_RIP] + 1);
  fault_address = info->si_addr;
  registers[REG_RIP] = reinterpret_cast<greg_t>(report_fault);
  registers[REG_RSP] = reinterpret_cast<greg_t>(running->stack + kStackBytes - 8);
}

char handler_stack[64 * 1024];

}  // namespace

FaultGuard::FaultGuard() {
  if (under_asan() || under_tsan()) return;
  const stack_t stack{handler_stack, 0, sizeof handler_stack};
  sigaltstack(&stack, &previous_stack_);
  struct sigaction action {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_segv_);
  sigaction(SIGBUS, &action, &previous_bus_);
}

FaultGuard::~FaultGuard() {
  if (under_asan() || under_tsan()) return;
  sigaction(SIGSEGV, &previous_segv_, nullptr);
  sigaction(SIGBUS, &previous_bus_, nullptr);
  sigaltstack(&previous_stack_, nullptr);
}

}  // namespace emu
