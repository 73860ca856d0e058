// What the host side of the emulator (python.cpp, runner.cpp) asks of the runtime.
#pragma once

#include <cstddef>
#include <vector>

#include "runtime.h"

namespace emu {

// Device memory of one call. written: its contents are input.
void* device_allocate(size_t bytes, bool written);
void device_free_all();
bool overrun(const void* data);  // something was written just before or after it

// When tracing: bytes of an output that no thread ever wrote.
struct UnwrittenBytes {
  size_t count, first;
};
UnwrittenBytes unwritten_bytes(const void* data);

// Memory traffic of one instruction, summed over the warps that executed it.
struct Traffic {
  const void* pc;
  int access, space, bytes;  // access: load, store, atomic; space: 1 global, 2 shared; bytes per lane
  size_t requests = 0, lanes = 0;
  size_t sectors = 0, ideal_sectors = 0;  // 32-byte sectors of global memory
  size_t passes = 0, ideal_passes = 0;    // passes over the banks of shared memory
};
const std::vector<Traffic>& traffic();
const std::vector<Finding>& trace_findings();
void clear_trace();

}  // namespace emu
