// Stacks, shared memory and device buffers; and an allocator for the runtime itself, which sanitizers must not see.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "device.h"
#include "state.h"

namespace {

constexpr size_t kSmallest = 32, kLargestPooled = 64 * 1024, kHeader = 16, kPageBytes = 4096;

char* raw_map(size_t bytes) {
  const long p = syscall(SYS_mmap, nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p < 0 && p > -4096) std::abort();
  return reinterpret_cast<char*>(p);
}

struct FreeBlock {
  FreeBlock* next;
};
FreeBlock* free_blocks[16];
char* arena;
size_t arena_left;

int size_class(size_t bytes) {
  int c = 0;
  while ((kSmallest << c) < bytes) c++;
  return c;
}

void* pooled(size_t bytes) {
  const int c = size_class(bytes);
  if (FreeBlock* block = free_blocks[c]) {
    free_blocks[c] = block->next;
    return block;
  }
  const size_t rounded = kSmallest << c;
  if (arena_left < rounded) arena = raw_map(arena_left = 4 << 20);
  arena_left -= rounded;
  return arena + arena_left;
}

}  // namespace

void* operator new(size_t bytes) {
  bytes += kHeader;
  char* p = static_cast<char*>(bytes <= kLargestPooled ? pooled(bytes) : raw_map(bytes));
  *reinterpret_cast<size_t*>(p) = bytes;
  return p + kHeader;
}

void operator delete(void* user) noexcept {
  if (!user) return;
  char* p = static_cast<char*>(user) - kHeader;
  const size_t bytes = *reinterpret_cast<size_t*>(p);
  if (bytes > kLargestPooled) {
    syscall(SYS_munmap, p, bytes);
    return;
  }
  auto* block = reinterpret_cast<FreeBlock*>(p);
  block->next = free_blocks[size_class(bytes)];
  free_blocks[size_class(bytes)] = block;
}

void operator delete(void* user, size_t) noexcept { operator delete(user); }

// The runtime's own, so that calls the compiler makes up are not taken for accesses of the running thread.
extern "C" {

void* memset(void* to, int byte, size_t bytes) {
  void* p = to;
  asm volatile("rep stosb" : "+D"(p), "+c"(bytes) : "a"(byte) : "memory");
  return to;
}

void* memcpy(void* to, const void* from, size_t bytes) {
  void* p = to;
  asm volatile("rep movsb" : "+D"(p), "+S"(from), "+c"(bytes) : : "memory");
  return to;
}

void* memmove(void* to, const void* from, size_t bytes) {
  if (to <= from) return memcpy(to, from, bytes);
  for (size_t i = bytes; i-- > 0;) static_cast<volatile char*>(to)[i] = static_cast<const volatile char*>(from)[i];
  return to;
}
}

namespace emu {
namespace {

constexpr size_t kGuardBytes = 256;

struct Buffer {
  char* data;
  size_t bytes;
  std::vector<bool> written;  // empty: all of it
};
std::vector<Buffer> buffers;
std::vector<char*> stack_pool;

// Around every array: NaN as float, bfloat16 and half, other ones for each array, so that copying guard to guard shows.
// ASan has red zones of its own.
char guard_byte(size_t array, size_t i) { return static_cast<char>(i % 4 ? 0xff : 0xff - array % 120); }
size_t guard_bytes() { return under_asan() ? 0 : kGuardBytes; }

char* add_guards(void* memory, size_t bytes, size_t array) {
  char* data = static_cast<char*>(memory) + guard_bytes();
  for (size_t i = 0; i < guard_bytes(); i++) data[bytes + i] = data[i - guard_bytes()] = guard_byte(array, i);
  return data;
}

bool guards_intact(const char* data, size_t bytes, size_t array) {
  for (size_t i = 0; i < guard_bytes(); i++)
    if (data[bytes + i] != guard_byte(array, i) || data[i - guard_bytes()] != guard_byte(array, i)) return false;
  return true;
}

// TSan forgets whole pages only.
size_t whole_pages(size_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

bool inside(const void* p, const char* data, size_t bytes) {
  return p >= data && p < data + bytes;
}

}  // namespace

Tag* new_tag(const void* block) {
  static char* page;
  static size_t left;
  if (left < sizeof(Tag)) page = raw_map(left = 1 << 20);
  left -= sizeof(Tag);
  auto* tag = reinterpret_cast<Tag*>(page + left);
  tag->block = block;
  return tag;
}

char* map_stack() {
  if (!stack_pool.empty()) {
    char* stack = stack_pool.back();
    stack_pool.pop_back();
    return stack;
  }
  char* stack = raw_map(kStackBytes);
  if (!under_tsan()) mprotect(stack, kPageBytes, PROT_NONE);
  return stack;
}

void unmap_stack(char* stack) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStackBytes);
  // TSan forgets what it saw at an address only when that is unmapped.
  if (under_tsan()) munmap(stack, kStackBytes);
  else stack_pool.push_back(stack);
}

char* allocate_shared(size_t bytes) {
  void* memory = nullptr;
  const size_t all = bytes + 2 * guard_bytes();
  if (under_tsan()) memory = raw_map(whole_pages(all));
  else if (posix_memalign(&memory, 128, all)) std::abort();
  char* data = add_guards(memory, bytes, 0);
  memset(data, 0xff, bytes);
  return data;
}

void free_shared(char* data, size_t bytes) {
  if (!data) return;
  char* memory = data - guard_bytes();
  if (under_tsan()) munmap(memory, whole_pages(bytes + 2 * guard_bytes()));
  else free(memory);
}

bool shared_intact(const Block* block) {
  for (const SharedArray& array : block->shared)
    if (array.data && !guards_intact(array.data, array.bytes, 0)) return false;
  return true;
}

void* dynamic_shared() { return running->block->shared[0].data; }

void* static_shared(const void* key, size_t bytes) {
  auto& arrays = running->block->shared;
  for (const SharedArray& array : arrays)
    if (array.key == key) return array.data;
  size_t total = bytes;
  for (const SharedArray& array : arrays) total += array.bytes;
  if (total > 227 * 1024)
    fail(make_finding("shared-memory", {__builtin_return_address(0)},
                      "the block needs %zu bytes of shared memory, more than 227 KiB", total));
  arrays.push_back({key, allocate_shared(bytes), bytes, std::vector<bool>(options.tracing ? bytes : 0)});
  return arrays.back().data;
}

void* device_allocate(size_t bytes, bool written) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes + 2 * guard_bytes())) std::abort();
  char* data = add_guards(memory, bytes, buffers.size());
  buffers.push_back({data, bytes, std::vector<bool>(options.tracing && !written ? bytes : 0)});
  return data;
}

bool overrun(const void* data) {
  for (size_t k = 0; k < buffers.size(); k++)
    if (buffers[k].data == data && !guards_intact(buffers[k].data, buffers[k].bytes, k)) return true;
  return false;
}

UnwrittenBytes unwritten_bytes(const void* data) {
  UnwrittenBytes found{0, 0};
  for (const Buffer& buffer : buffers) {
    if (buffer.data != data) continue;
    for (size_t i = buffer.written.size(); i-- > 0;) {
      if (buffer.written[i]) continue;
      found.count++;
      found.first = i;
    }
  }
  return found;
}

void device_free_all() {
  for (const Buffer& buffer : buffers) free(buffer.data - guard_bytes());
  buffers.clear();
}

Place place_of(const void* p) {
  for (SharedArray& array : running->block->shared)
    if (inside(p, array.data, array.bytes))
      return {Space::shared, &array.written, static_cast<size_t>(static_cast<const char*>(p) - array.data)};
  for (Buffer& buffer : buffers)
    if (inside(p, buffer.data, buffer.bytes))
      return {Space::global, buffer.written.empty() ? nullptr : &buffer.written,
              static_cast<size_t>(static_cast<const char*>(p) - buffer.data)};
  return {Space::other, nullptr, 0};
}

void show_read(const void* p, size_t bytes, const void* pc) {
  if (under_asan()) __asan_loadN(p, bytes);
  if (under_tsan()) __tsan_read_range(const_cast<void*>(p), bytes);
  if (options.tracing) trace(p, bytes, Access::load, pc);
}

void show_write(void* p, size_t bytes, const void* pc) {
  if (under_asan()) __asan_storeN(p, bytes);
  if (under_tsan()) __tsan_write_range(p, bytes);
  if (options.tracing) trace(p, bytes, Access::store, pc);
}

}  // namespace emu
