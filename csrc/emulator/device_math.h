// Device functions that need no runtime.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "atomics.h"

template <class A, class B>
GPU_DEVICE std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
GPU_DEVICE std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

GPU_DEVICE int __popc(unsigned x) { return __builtin_popcount(x); }
GPU_DEVICE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
GPU_DEVICE int __ffs(int x) { return __builtin_ffs(x); }
GPU_DEVICE int __ffsll(long long x) { return __builtin_ffsll(x); }
GPU_DEVICE int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
GPU_DEVICE int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
GPU_DEVICE unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
GPU_DEVICE int __float_as_int(float x) { return emu::bits_as<int>(x); }
GPU_DEVICE unsigned __float_as_uint(float x) { return emu::bits_as<unsigned>(x); }
GPU_DEVICE float __int_as_float(int x) { return emu::bits_as<float>(x); }
GPU_DEVICE float __uint_as_float(unsigned x) { return emu::bits_as<float>(x); }

GPU_DEVICE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
GPU_DEVICE float __expf(float x) { return expf(x); }
GPU_DEVICE float __logf(float x) { return logf(x); }
GPU_DEVICE float __fdividef(float a, float b) { return a / b; }
GPU_DEVICE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
GPU_DEVICE float __fadd_rn(float a, float b) { return a + b; }
GPU_DEVICE float __fmul_rn(float a, float b) { return a * b; }

template <class T>
GPU_DEVICE T __ldg(const T* p) { return *p; }
template <class T>
GPU_DEVICE T __ldcs(const T* p) { return *p; }
template <class T>
GPU_DEVICE void __stcs(T* p, emu::As<T> value) { *p = value; }
