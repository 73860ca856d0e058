// Entry points of the sanitizer that is loaded, if any: the addresses are null otherwise.
#pragma once

#include <cstddef>

extern "C" {
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_acquire(void* tag);
__attribute__((weak)) void __tsan_release(void* tag);
__attribute__((weak)) void __tsan_read_range(void* p, size_t bytes);
__attribute__((weak)) void __tsan_write_range(void* p, size_t bytes);
__attribute__((weak)) void __asan_loadN(const void* p, size_t bytes);
__attribute__((weak)) void __asan_storeN(const void* p, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const void volatile* p, size_t bytes);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** stack, size_t* bytes);
}

namespace emu {

inline bool under_tsan() { return __tsan_create_fiber != nullptr; }
inline bool under_asan() { return __asan_loadN != nullptr; }

}  // namespace emu
