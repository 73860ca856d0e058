// Atomics of CUDA (relaxed), fences, and the ordered ones of namespace gpu.
#pragma once

#include <cstdint>
#include <type_traits>

#include "runtime.h"

namespace emu {

template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class To, class From>
GPU_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Fibers switch only inside the runtime, so a load and an exchange are one step; both are atomics to a sanitizer.
template <class T, class F>
GPU_DEVICE T read_modify_write(T* p, F update) {
  maybe_yield();
  auto* q = reinterpret_cast<Bits<T>*>(p);
  before_atomic(p, Order::relaxed);
  const T old = bits_as<T>(__atomic_load_n(q, __ATOMIC_RELAXED));
  __atomic_exchange_n(q, bits_as<Bits<T>>(static_cast<T>(update(old))), __ATOMIC_RELAXED);
  after_atomic(p, Order::relaxed, true, true);
  return old;
}

// Wraps around, as the hardware does.
template <class T>
GPU_DEVICE T add(T a, T b) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
  else return a + b;
}

template <class T>
struct Same {
  using type = T;
};
template <class T>
using As = typename Same<T>::type;

}  // namespace emu

template <class T>
GPU_DEVICE T atomicAdd(T* p, emu::As<T> v) { return emu::read_modify_write(p, [=](T old) { return emu::add(old, v); }); }
template <class T>
GPU_DEVICE T atomicSub(T* p, emu::As<T> v) { return emu::read_modify_write(p, [=](T old) { return emu::add(old, static_cast<T>(~v + 1u)); }); }
template <class T>
GPU_DEVICE T atomicMin(T* p, emu::As<T> v) { return emu::read_modify_write(p, [=](T old) { return old < v ? old : v; }); }
template <class T>
GPU_DEVICE T atomicMax(T* p, emu::As<T> v) { return emu::read_modify_write(p, [=](T old) { return old > v ? old : v; }); }
template <class T>
GPU_DEVICE T atomicAnd(T* p, emu::As<T> v) { return emu::read_modify_write(p, [=](T old) { return old & v; }); }
template <class T>
GPU_DEVICE T atomicOr(T* p, emu::As<T> v) { return emu::read_modify_write(p, [=](T old) { return old | v; }); }
template <class T>
GPU_DEVICE T atomicXor(T* p, emu::As<T> v) { return emu::read_modify_write(p, [=](T old) { return old ^ v; }); }
template <class T>
GPU_DEVICE T atomicExch(T* p, emu::As<T> v) { return emu::read_modify_write(p, [=](T) { return v; }); }
template <class T>
GPU_DEVICE T atomicCAS(T* p, emu::As<T> expected, emu::As<T> v) {
  return emu::read_modify_write(p, [=](T old) { return old == expected ? v : old; });
}
GPU_DEVICE unsigned atomicInc(unsigned* p, unsigned limit) {
  return emu::read_modify_write(p, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
GPU_DEVICE unsigned atomicDec(unsigned* p, unsigned limit) {
  return emu::read_modify_write(p, [=](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

GPU_DEVICE void __threadfence() { emu::fence(true); }
GPU_DEVICE void __threadfence_system() { emu::fence(true); }
GPU_DEVICE void __threadfence_block() { emu::fence(false); }
GPU_DEVICE void __nanosleep(unsigned) { emu::maybe_yield(); }

namespace gpu {

GPU_DEVICE int ld_acquire(const int* p) {
  emu::maybe_yield();
  emu::before_atomic(p, emu::Order::acquire);
  const int value = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  emu::after_atomic(p, emu::Order::acquire, true, false);
  return value;
}

GPU_DEVICE void st_release(int* p, int value) {
  emu::before_atomic(p, emu::Order::release);
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
  emu::after_atomic(p, emu::Order::release, false, true);
  emu::maybe_yield();
}

GPU_DEVICE int atomic_add_acq_rel(int* p, int value) {
  emu::maybe_yield();
  emu::before_atomic(p, emu::Order::acq_rel);
  const int old = __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
  emu::after_atomic(p, emu::Order::acq_rel, true, true);
  return old;
}

}  // namespace gpu
