// Blocks, warps and fibers of the running grid; internal to the runtime.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime.h"
#include "sanitizers.h"

namespace emu {

constexpr size_t kStackBytes = 256 * 1024;

// Where TSan hangs a happens-before edge. Never reused: a stale clock would hide races.
struct Tag {
  const void* block;  // of a block-wide fence; null: whole device
};
Tag* new_tag(const void* block = nullptr);
inline void release(Tag* tag) { if (__tsan_release) __tsan_release(tag); }
inline void acquire(Tag* tag) { if (__tsan_acquire) __tsan_acquire(tag); }

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  int group;
  const void* pc;
};

struct Fiber;

// Lanes of one mask meeting at warp operations. Two generations: a fast lane may arrive again before a slow one has read.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  int generation = 0;
  WarpOp op = WarpOp::sync;
  const void* pc = nullptr;
  Tag* tags[2] = {new_tag(), new_tag()};
  Lanes lanes[2];
};

struct Warp {
  unsigned exists = 0, live = 0;
  std::vector<Meeting*> meetings;
};

struct SharedArray {
  const void* key;
  char* data;
  size_t bytes;
  std::vector<bool> written;  // only when tracing
};

struct Block {
  uint3 index;
  int live = 0;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  std::vector<SharedArray> shared;  // the first is the dynamic one

  // __syncthreads, two phases for the same reason as in Meeting
  int waiting = 0, phase = 0;
  int votes[2] = {};
  Site site{};
  const void* pc = nullptr;
  Tag* tags[2] = {new_tag(), new_tag()};
};

struct Fiber {
  Context context;
  Block* block;
  Warp* warp;
  int index;
  bool done;
  void* sp;
  char* stack;
  void* tsan_fiber;
  void* fake_stack;
  std::vector<Copy> copies;
  int copy_group;
  Tag* last_fence;
  std::vector<Tag*> seen_tags;  // releases this thread has observed but not yet acquired
};

extern Fiber* running;

void make_ready(Fiber* fiber);
void wait();                    // until someone makes the running fiber ready
void yield_at(const void* pc);  // perhaps lets another thread run
void made_progress();           // some thread got past a rendezvous: not a livelock

struct At {
  const void *guilty, *other = nullptr;
};
Finding make_finding(const char* kind, At at, const char* format, ...) __attribute__((format(printf, 3, 4)));
[[noreturn]] void fail(const Finding& finding);

struct Name {
  char text[96];
};
Name name_of(const Fiber* fiber);

const Lanes& meet(unsigned mask, WarpOp op, const void* mine, size_t bytes, const void* pc);
void lane_exits(Fiber* fiber);  // rendezvous that the fiber's end completes or breaks
void forget_fences();

char* map_stack();
void unmap_stack(char* stack);
char* allocate_shared(size_t bytes);
void free_shared(char* data, size_t bytes);
bool shared_intact(const Block* block);  // nothing was written just before or after an array

enum class Space { other, global, shared };
struct Place {
  Space space;
  std::vector<bool>* written;  // null: all of it counts as written
  size_t offset;
};
Place place_of(const void* p);

// An access by the runtime on behalf of the running thread, shown to the sanitizer or tracer.
void show_read(const void* p, size_t bytes, const void* pc);
void show_write(void* p, size_t bytes, const void* pc);

enum class Access { load, store, atomic };
void trace(const void* p, size_t bytes, Access access, const void* pc);
void trace_block_ends(const Block* block);

}  // namespace emu
