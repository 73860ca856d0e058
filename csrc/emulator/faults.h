// Turns a segmentation fault inside a kernel into a finding; a sanitizer, if there is one, does that itself.
#pragma once

#include <signal.h>

namespace emu {

class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;

 private:
  struct sigaction previous_segv_, previous_bus_;
  stack_t previous_stack_;
};

}  // namespace emu
