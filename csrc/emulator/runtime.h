// What the emulated half of gpu.h asks of the runtime. The runtime itself is never compiled with a sanitizer.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <exception>

namespace emu {

// Tells barriers apart. As a default argument, Site::here() is the line of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};

struct Context {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  int lane;
};

// The CUDA thread that runs now; null outside kernels.
extern Context* current;

// A mistake of the kernel: what, in words, and the return addresses involved, the guilty one first, or null.
// Plain data: the runtime and its users do not share an allocator.
struct Finding {
  char kind[24];
  char message[256];
  const void* at[2];
};

// Ends the launch; thrown on the host's stack, so that host code unwinds.
struct __attribute__((visibility("default"))) Failure : std::exception {
  explicit Failure(const Finding& found) : finding(found) {}
  const char* what() const noexcept override { return finding.message; }
  Finding finding;
};

struct Options {
  uint64_t seed = 0;       // of the order in which blocks and threads run
  int resident = 2;        // blocks that run at the same time
  double yield = 0.1;      // chance that an atomic or fence lets another thread run
  bool tracing = false;    // the kernel was built with trace_hooks.cpp
};
extern Options options;

// nullptr, or why the launch is invalid. invoke(kernel) runs once per thread.
const char* launch(dim3 grid, dim3 block, size_t shared_bytes, void (*invoke)(const void*), const void* kernel);

void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);

enum class Vote { none, count, all, any };
int block_barrier(Vote vote, int predicate, Site site);

enum class WarpOp { sync, shuffle, ballot, match, reduce, ldmatrix, mma };

// What the 32 lanes brought to a warp operation.
struct Lanes {
  static constexpr size_t kBytes = 64;
  unsigned mask;  // lanes that took part
  alignas(16) char data[32][kBytes];

  // Lanes that did not take part give the poison pattern: NaN or -1.
  template <class T>
  T get(int lane) const {
    T value;
    __builtin_memset(&value, 0xff, sizeof value);
    if (mask >> lane & 1) __builtin_memcpy(&value, data[lane], sizeof value);
    return value;
  }
};

const Lanes& warp_meet(unsigned mask, WarpOp op, const void* mine, size_t bytes);
unsigned active_lanes();

void maybe_yield();

// Atomics call these around the access, fences instead of one, so that fence-fence synchronisation is modelled.
enum class Order { relaxed, acquire, release, acq_rel };
void before_atomic(const void* p, Order order);
void after_atomic(const void* p, Order order, bool reads, bool writes);
void fence(bool whole_device);

void cp_async(void* to_shared, const void* from_global, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int pending_groups);

void ldmatrix(unsigned* out, const void* row, int matrices, bool transposed);
void mma_m16n8k16(float* d, const unsigned* a, const unsigned* b, bool bf16);

}  // namespace emu
