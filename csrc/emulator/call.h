// One call of an entry: arguments into device memory, the call, results back, findings collected.
#pragma once

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "entry.h"

namespace emu {

struct Argument {
  Value value{};
  char* host = nullptr;  // an array of `bytes` bytes; null: `value` itself
  size_t bytes = 0;
  bool writable = false, unwritten = false;
};

struct Where {
  std::string library;
  size_t offset;  // of the instruction, not of the return address
};

struct Report {
  std::string kind, message;
  std::vector<Where> at;
};

struct Outcome {
  Value value{};
  std::vector<Report> reports;
};

inline const std::vector<Entry>& load_entries(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(dlerror());
  using Lookup = const std::vector<Entry>* (*)();
  const auto lookup = reinterpret_cast<Lookup>(dlsym(handle, "gpu_emulator_entries"));
  if (!lookup) throw std::runtime_error(library + " has no GPU_ENTRY");
  return *lookup();
}

inline const Entry& find_entry(const std::string& library, const std::string& name) {
  for (const Entry& entry : load_entries(library))
    if (name == entry.name) return entry;
  throw std::runtime_error(library + " has no GPU_ENTRY(" + name + ")");
}

inline Where locate(const void* return_address) {
  const char* pc = static_cast<const char*>(return_address) - 1;
  Dl_info info{};
  if (!dladdr(pc, &info)) return {"", 0};
  return {info.dli_fname, static_cast<size_t>(pc - static_cast<const char*>(info.dli_fbase))};
}

inline Report report_of(const Finding& finding) {
  Report report{finding.kind, finding.message, {}};
  for (const void* at : finding.at)
    if (at) report.at.push_back(locate(at));
  return report;
}

inline void check_outputs(const std::vector<Argument>& arguments, const std::vector<Value>& values, Outcome& outcome) {
  for (size_t i = 0; i < arguments.size(); i++) {
    if (!arguments[i].host) continue;
    const std::string name = "argument " + std::to_string(i);
    if (overrun(values[i].pointer))
      outcome.reports.push_back({"out-of-bounds", "something wrote just before or after " + name, {}});
    const UnwrittenBytes unwritten = unwritten_bytes(values[i].pointer);
    if (unwritten.count)
      outcome.reports.push_back({"unwritten-output",
                                 std::to_string(unwritten.count) + " of " + std::to_string(arguments[i].bytes) + " bytes of " + name +
                                     " were never written, the first at byte " + std::to_string(unwritten.first),
                                 {}});
  }
}

struct FreeDeviceMemory {
  ~FreeDeviceMemory() { device_free_all(); }
};

inline Outcome call(const Entry& entry, const std::vector<Argument>& arguments) {
  const FreeDeviceMemory at_end;
  Outcome outcome;
  std::vector<Value> values;
  for (const Argument& argument : arguments) {
    values.push_back(argument.value);
    if (!argument.host) continue;
    values.back().pointer = device_allocate(argument.bytes, !argument.unwritten);
    std::memcpy(values.back().pointer, argument.host, argument.bytes);
  }
  try {
    outcome.value = entry.call(values.data());
    check_outputs(arguments, values, outcome);
  } catch (const Failure& failure) {
    outcome.reports.push_back(report_of(failure.finding));
  }
  for (const Finding& finding : trace_findings()) outcome.reports.push_back(report_of(finding));
  for (size_t i = 0; i < arguments.size(); i++)
    if (arguments[i].writable) std::memcpy(arguments[i].host, values[i].pointer, arguments[i].bytes);
  return outcome;
}

}  // namespace emu
