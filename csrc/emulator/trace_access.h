// From the hooks of a traced kernel to the tracer.
#pragma once

#include <cstddef>

namespace emu {

void trace_load(const void* p, size_t bytes, const void* pc);
void trace_store(const void* p, size_t bytes, const void* pc);
void trace_atomic(const void* p, size_t bytes, const void* pc);

}  // namespace emu
