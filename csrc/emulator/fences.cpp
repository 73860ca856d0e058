// Synchronisation through relaxed atomics and __threadfence, which TSan does not model: a fence publishes a tag through
// every atomic the thread writes afterwards; a thread that has read such an atomic takes the tag at its own next fence.
#include <algorithm>
#include <unordered_map>

#include "state.h"

namespace emu {
namespace {

std::unordered_map<const void*, std::vector<Tag*>> published;

bool releases(Order order) { return order == Order::release || order == Order::acq_rel; }
bool acquires(Order order) { return order == Order::acquire || order == Order::acq_rel; }

void take(Tag* tag) {
  if (!tag->block || tag->block == running->block) acquire(tag);
}

void remember(const std::vector<Tag*>& tags) {
  auto& seen = running->seen_tags;
  for (Tag* tag : tags)
    if (std::find(seen.begin(), seen.end(), tag) == seen.end()) seen.push_back(tag);
}

Tag* publish_here(const void* block) {
  Tag* tag = new_tag(block);
  release(tag);
  return tag;
}

}  // namespace

void forget_fences() { published.clear(); }

void fence(bool whole_device) {
  yield_at(__builtin_return_address(0));
  if (!under_tsan()) return;
  for (Tag* tag : running->seen_tags) take(tag);
  running->seen_tags.clear();
  running->last_fence = publish_here(whole_device ? nullptr : running->block);
}

void before_atomic(const void* p, Order order) {
  if (!under_tsan() || !releases(order)) return;
  if (order == Order::release) published[p].clear();
  published[p].push_back(publish_here(nullptr));
}

void after_atomic(const void* p, Order order, bool reads, bool writes) {
  if (!under_tsan()) return;
  auto& tags = published[p];
  if (reads && acquires(order))
    for (Tag* tag : tags) take(tag);
  else if (reads)
    remember(tags);
  if (writes && running->last_fence && (tags.empty() || tags.back() != running->last_fence))
    tags.push_back(running->last_fence);
}

}  // namespace emu
