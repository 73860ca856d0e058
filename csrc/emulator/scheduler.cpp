// Runs a grid: one fiber per CUDA thread, a few blocks at a time, in an order drawn from the seed.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>

#include "faults.h"
#include "fiber.h"
#include "state.h"

namespace emu {

Context* current = nullptr;
Fiber* running = nullptr;
Options options;

namespace {

constexpr long kSpinLimit = 2'000'000;  // switches without progress before a spin counts as a livelock

struct Grid {
  dim3 size, block_size;
  size_t shared_bytes;
  void (*invoke)(const void*);
  const void* kernel;
  std::mt19937_64 random;
  std::vector<Fiber*> ready;
  std::vector<Block*> blocks;
  std::unique_ptr<Finding> failure;
  Tag* end;
  long spins = 0;
};
Grid* grid = nullptr;

int threads_of(dim3 block) { return static_cast<int>(block.x * block.y * block.z); }

void start_block(size_t number) {
  const dim3 g = grid->size, b = grid->block_size;
  auto* block = new Block;
  block->index = {static_cast<unsigned>(number % g.x), static_cast<unsigned>(number / g.x % g.y),
                  static_cast<unsigned>(number / g.x / g.y)};
  block->live = threads_of(b);
  block->warps.resize((block->live + 31) / 32);
  block->shared.push_back({nullptr, nullptr, 0, {}});
  if (grid->shared_bytes) block->shared[0] = {nullptr, allocate_shared(grid->shared_bytes), grid->shared_bytes, {}};
  if (options.tracing) block->shared[0].written.assign(grid->shared_bytes, false);
  for (unsigned i = 0; i < static_cast<unsigned>(block->live); i++) {
    auto* fiber = new Fiber{};
    fiber->context = {{i % b.x, i / b.x % b.y, i / b.x / b.y}, block->index, b, g, static_cast<int>(i % 32)};
    fiber->block = block;
    fiber->warp = &block->warps[i / 32];
    fiber->index = static_cast<int>(i);
    fiber->warp->exists |= 1u << i % 32;
    prepare_fiber(fiber);
    block->fibers.push_back(fiber);
    grid->ready.push_back(fiber);
  }
  for (Warp& warp : block->warps) warp.live = warp.exists;
  grid->blocks.push_back(block);
}

void end_block(Block* block) {
  for (Fiber* fiber : block->fibers) {
    retire_fiber(fiber);
    delete fiber;
  }
  for (Warp& warp : block->warps)
    for (Meeting* meeting : warp.meetings) delete meeting;
  for (SharedArray& array : block->shared) free_shared(array.data, array.bytes);
  grid->blocks.erase(std::find(grid->blocks.begin(), grid->blocks.end(), block));
  delete block;
}

Fiber* pick() {
  auto& ready = grid->ready;
  std::swap(ready[grid->random() % ready.size()], ready.back());
  Fiber* fiber = ready.back();
  ready.pop_back();
  return fiber;
}

Finding deadlock() {
  At at{nullptr};
  int at_barrier = 0;
  for (Block* block : grid->blocks) {
    at_barrier += block->waiting;
    if (block->waiting) at = {block->pc, at.guilty};
    for (Warp& warp : block->warps)
      for (Meeting* meeting : warp.meetings)
        if (meeting->arrived) at = {meeting->pc, at.guilty};
  }
  return make_finding("deadlock", at, "every live thread waits for threads that do not come; %d wait at a barrier", at_barrier);
}

void run_grid() {
  std::vector<size_t> order(static_cast<size_t>(grid->size.x) * grid->size.y * grid->size.z);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), grid->random);
  size_t next = 0;
  while (!grid->failure && (next < order.size() || !grid->blocks.empty())) {
    while (grid->blocks.size() < static_cast<size_t>(options.resident) && next < order.size()) start_block(order[next++]);
    if (grid->ready.empty()) {
      grid->failure.reset(new Finding(deadlock()));
      break;
    }
    running = pick();
    current = &running->context;
    switch_to(running);
    if (running->done && running->block->live == 0 && !grid->failure) {
      if (options.tracing) trace_block_ends(running->block);
      if (!shared_intact(running->block))
        grid->failure.reset(new Finding(
            make_finding("out-of-bounds", {nullptr}, "something wrote just before or after an array in shared memory")));
      end_block(running->block);
    }
  }
  running = nullptr;
  current = nullptr;
  while (!grid->blocks.empty()) end_block(grid->blocks.back());
}

const char* invalid(dim3 size, dim3 block, size_t shared_bytes) {
  if (block.x * block.y * static_cast<size_t>(block.z) - 1 >= 1024) return "invalid configuration: a block has 1 to 1024 threads";
  if (block.z > 64) return "invalid configuration: blockDim.z is at most 64";
  if (size.y > 65535 || size.z > 65535) return "invalid configuration: gridDim.y and gridDim.z are at most 65535";
  if (size.x > 0x7fffffff) return "invalid configuration: gridDim.x is at most 2^31 - 1";
  if (shared_bytes > 227 * 1024) return "invalid configuration: more than 227 KiB of shared memory";
  if (running) return "a kernel cannot launch a kernel here";
  return nullptr;
}

}  // namespace

void make_ready(Fiber* fiber) { grid->ready.push_back(fiber); }
void wait() { switch_to_host(running); }
void made_progress() { grid->spins = 0; }

void maybe_yield() { yield_at(__builtin_return_address(0)); }

void yield_at(const void* pc) {
  const double draw = static_cast<double>(grid->random() >> 11) * 0x1p-53;
  if (draw >= options.yield) return;
  if (++grid->spins > kSpinLimit)
    fail(make_finding("livelock", {pc}, "%s spins, and no thread gets any further", name_of(running).text));
  make_ready(running);
  wait();
}

Finding make_finding(const char* kind, At at, const char* format, ...) {
  Finding finding{};
  snprintf(finding.kind, sizeof finding.kind, "%s", kind);
  va_list values;
  va_start(values, format);
  vsnprintf(finding.message, sizeof finding.message, format, values);
  va_end(values);
  finding.at[0] = at.guilty;
  finding.at[1] = at.other;
  return finding;
}

void fail(const Finding& finding) {
  if (!grid->failure) grid->failure.reset(new Finding(finding));
  for (;;) switch_to_host(running);
}

Name name_of(const Fiber* fiber) {
  const uint3 t = fiber->context.thread, b = fiber->context.block;
  Name name;
  snprintf(name.text, sizeof name.text, "thread (%u,%u,%u) of block (%u,%u,%u)", t.x, t.y, t.z, b.x, b.y, b.z);
  return name;
}

void run_thread() {
  fiber_entered();
  grid->invoke(grid->kernel);
  Fiber* fiber = running;
  lane_exits(fiber);
  release(grid->end);
  made_progress();
  fiber->done = true;
  fiber->block->live--;
  for (;;) switch_to_host(fiber);
}

const char* launch(dim3 size, dim3 block, size_t shared_bytes, void (*invoke)(const void*), const void* kernel) {
  if (const char* why = invalid(size, block, shared_bytes)) return why;
  Grid here{size, block, shared_bytes, invoke, kernel, std::mt19937_64(options.seed), {}, {}, nullptr, new_tag()};
  grid = &here;
  start_host();
  {
    const FaultGuard guard;
    run_grid();
  }
  forget_fences();
  acquire(here.end);
  grid = nullptr;
  if (here.failure) throw Failure(*here.failure);
  return nullptr;
}

}  // namespace emu
