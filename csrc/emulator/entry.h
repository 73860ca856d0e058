// Host functions that can be called from outside: GPU_ENTRY(launch_it) after the function's definition.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace emu {

union Value {
  void* pointer;
  int64_t integer;
  double real;
};

struct Entry {
  const char* name;
  std::vector<std::string> parameters;  // "const f32*", "i32", ...
  std::string result;
  Value (*call)(const Value*);
};

template <class T>
std::string type_name() {
  if constexpr (std::is_pointer_v<T>) {
    using To = std::remove_pointer_t<T>;
    return (std::is_const_v<To> ? "const " : "") + type_name<std::remove_cv_t<To>>() + "*";
  } else if constexpr (std::is_enum_v<T>) {
    return type_name<std::underlying_type_t<T>>();
  } else if constexpr (std::is_void_v<T>) {
    return "void";
  } else if constexpr (std::is_same_v<T, char>) {
    return "char";
  } else if constexpr (std::is_same_v<T, bool>) {
    return "bool";
  } else if constexpr (std::is_integral_v<T>) {
    return (std::is_signed_v<T> ? "i" : "u") + std::to_string(8 * sizeof(T));
  } else if constexpr (std::is_floating_point_v<T>) {
    return "f" + std::to_string(8 * sizeof(T));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return "bf16";
  } else if constexpr (std::is_same_v<T, __half>) {
    return "f16";
  } else {
    return "struct" + std::to_string(sizeof(T));
  }
}

template <class T>
T from_value(const Value& value) {
  if constexpr (std::is_pointer_v<T>) return static_cast<T>(value.pointer);
  else if constexpr (std::is_floating_point_v<T>) return static_cast<T>(value.real);
  else return static_cast<T>(value.integer);
}

template <class T>
Value to_value(T x) {
  Value value{};
  if constexpr (std::is_pointer_v<T>) value.pointer = const_cast<void*>(static_cast<const void*>(x));
  else if constexpr (std::is_floating_point_v<T>) value.real = x;
  else value.integer = static_cast<int64_t>(x);
  return value;
}

template <auto Function, class R, class... P, size_t... I>
Value call_function(R (*)(P...), const Value* arguments, std::index_sequence<I...>) {
  if constexpr (std::is_void_v<R>) {
    Function(from_value<P>(arguments[I])...);
    return {};
  } else {
    return to_value(Function(from_value<P>(arguments[I])...));
  }
}

template <auto Function, class R, class... P>
Entry make_entry(const char* name, R (*)(P...)) {
  return {name, {type_name<P>()...}, type_name<R>(), [](const Value* arguments) {
            return call_function<Function>(Function, arguments, std::index_sequence_for<P...>());
          }};
}

inline std::vector<Entry>& entries() {
  static std::vector<Entry> list;
  return list;
}

inline bool add_entry(Entry entry) {
  entries().push_back(std::move(entry));
  return true;
}

}  // namespace emu

extern "C" __attribute__((weak, visibility("default"))) const std::vector<emu::Entry>* gpu_emulator_entries() {
  return &emu::entries();
}

#define GPU_ENTRY_NAME_(counter) gpu_entry_##counter
#define GPU_ENTRY_NAME(counter) GPU_ENTRY_NAME_(counter)
#define GPU_ENTRY(function) \
  [[maybe_unused]] static const bool GPU_ENTRY_NAME(__COUNTER__) = emu::add_entry(emu::make_entry<&function>(#function, &function))
