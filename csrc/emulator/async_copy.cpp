// cp.async, as late as the program allows: the destination is poison from the copy's issue to the wait that covers it.
#include <cstring>

#include "state.h"

namespace emu {
namespace {

void check(void* to, const void* from, int bytes, const void* pc) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes)
    fail(make_finding("misaligned-access", {pc}, "cp.async of %d bytes to or from an address that is no multiple of it", bytes));
  if (place_of(to).space != Space::shared)
    fail(make_finding("out-of-bounds", {pc}, "the destination of cp.async is not in this block's shared memory"));
}

void finish(const Copy& copy) {
  if (copy.valid) {
    if (under_tsan()) __tsan_read_range(const_cast<void*>(copy.from), copy.bytes);
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
  if (under_tsan()) __tsan_write_range(copy.to, copy.bytes);
  if (options.tracing) {
    const Place place = place_of(copy.to);
    for (int i = 0; place.written && i < copy.bytes; i++) (*place.written)[place.offset + i] = true;
  }
}

}  // namespace

void cp_async(void* to, const void* from, int bytes, bool valid) {
  const void* pc = __builtin_return_address(0);
  check(to, from, bytes, pc);
  if (valid) show_read(from, bytes, pc);
  show_write(to, bytes, pc);
  std::memset(to, 0xff, bytes);
  if (options.tracing) {
    const Place place = place_of(to);
    for (int i = 0; place.written && i < bytes; i++) (*place.written)[place.offset + i] = false;
  }
  running->copies.push_back({to, from, bytes, valid, running->copy_group, pc});
}

void cp_async_commit() { running->copy_group++; }

void cp_async_wait(int pending_groups) {
  std::vector<Copy> still;
  for (const Copy& copy : running->copies) {
    if (copy.group < running->copy_group - pending_groups) finish(copy);
    else still.push_back(copy);
  }
  running->copies = still;
}

}  // namespace emu
