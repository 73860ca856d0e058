// The calls that -fsanitize=thread puts around memory accesses, answered by the emulator's tracer instead of TSan.
// Linked into kernels that are built for tracing.
#include <cstdint>
#include <cstring>

#include "trace_access.h"

#define PC __builtin_return_address(0)
#define LOAD_STORE(suffix, bytes)                                                                   \
  void __tsan_read##suffix(void* p) { emu::trace_load(p, bytes, PC); }                              \
  void __tsan_write##suffix(void* p) { emu::trace_store(p, bytes, PC); }                            \
  void __tsan_unaligned_read##suffix(void* p) { emu::trace_load(p, bytes, PC); }                    \
  void __tsan_unaligned_write##suffix(void* p) { emu::trace_store(p, bytes, PC); }                  \
  void __tsan_volatile_read##suffix(void* p) { emu::trace_load(p, bytes, PC); }                     \
  void __tsan_volatile_write##suffix(void* p) { emu::trace_store(p, bytes, PC); }

// The emulator's read-modify-write is a relaxed load and an exchange: the exchange alone is counted.
#define ATOMIC(bits, T)                                                            \
  T __tsan_atomic##bits##_load(const volatile T* p, int order) {                   \
    if (order != __ATOMIC_RELAXED) emu::trace_load(const_cast<T*>(p), sizeof(T), PC); \
    return *p;                                                                     \
  }                                                                                \
  void __tsan_atomic##bits##_store(volatile T* p, T value, int) {                  \
    emu::trace_store(const_cast<T*>(p), sizeof(T), PC);                            \
    *p = value;                                                                    \
  }                                                                                \
  T __tsan_atomic##bits##_exchange(volatile T* p, T value, int) {                  \
    emu::trace_atomic(const_cast<T*>(p), sizeof(T), PC);                           \
    const T old = *p;                                                              \
    *p = value;                                                                    \
    return old;                                                                    \
  }                                                                                \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T value, int) {                 \
    emu::trace_atomic(const_cast<T*>(p), sizeof(T), PC);                           \
    const T old = *p;                                                              \
    *p = static_cast<T>(old + value);                                              \
    return old;                                                                    \
  }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

LOAD_STORE(1, 1)
LOAD_STORE(2, 2)
LOAD_STORE(4, 4)
LOAD_STORE(8, 8)
LOAD_STORE(16, 16)
void __tsan_read_range(void* p, size_t bytes) { emu::trace_load(p, bytes, PC); }
void __tsan_write_range(void* p, size_t bytes) { emu::trace_store(p, bytes, PC); }

ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)

// Linked with --wrap: TSan leaves these to its interceptors.
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  emu::trace_load(from, bytes, PC);
  emu::trace_store(to, bytes, PC);
  return memmove(to, from, bytes);
}
void* __wrap_memset(void* to, int byte, size_t bytes) {
  emu::trace_store(to, bytes, PC);
  auto* p = static_cast<volatile char*>(to);
  for (size_t i = 0; i < bytes; i++) p[i] = static_cast<char>(byte);
  return to;
}

}
