// __syncthreads and warp operations: where threads meet, and what it means when some do not come.
#include <cstring>

#include "state.h"

namespace emu {
namespace {

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::sync: return "__syncwarp";
    case WarpOp::shuffle: return "a shuffle";
    case WarpOp::ballot: return "a vote";
    case WarpOp::match: return "a match";
    case WarpOp::reduce: return "a warp reduction";
    case WarpOp::ldmatrix: return "ldmatrix";
    case WarpOp::mma: return "mma";
  }
  return "";
}

void complete(Meeting* meeting, const Block* block, const Warp* warp) {
  const long first = 32 * (warp - block->warps.data());
  const unsigned came = meeting->arrived;
  meeting->lanes[meeting->generation & 1].mask = came;
  meeting->arrived = 0;
  meeting->generation++;
  made_progress();
  for (int lane = 0; lane < 32; lane++)
    if (came >> lane & 1) make_ready(block->fibers[first + lane]);
}

// The meeting this lane joins; a new one when no lane of the mask waits.
Meeting* meeting_for(Warp* warp, unsigned mask, WarpOp op, const void* pc) {
  Meeting* idle = nullptr;
  for (Meeting* m : warp->meetings) {
    if (m->arrived && (m->mask & mask)) {
      if (m->mask == mask && m->op == op) return m;
      fail(make_finding("divergence", {pc, m->pc}, "lanes of one warp meet different operations: %s and %s%s", name_of(m->op),
                        name_of(op), m->mask == mask ? "" : ", with different masks"));
    }
    if (!m->arrived && m->mask == mask) idle = m;
  }
  if (!idle) warp->meetings.push_back(idle = new Meeting);
  idle->mask = mask;
  idle->op = op;
  idle->pc = pc;
  return idle;
}

// Lanes that never existed (a partial last warp) may be named; those that returned may be named only to __syncwarp.
unsigned check_mask(const Warp* warp, unsigned mask, int lane, WarpOp op, const void* pc) {
  if (!(mask >> lane & 1))
    fail(make_finding("warp-mask", {pc}, "%s takes part in %s whose mask does not name it", name_of(running).text, name_of(op)));
  mask &= warp->exists;
  if (op != WarpOp::sync && (mask & ~warp->live))
    fail(make_finding("warp-mask", {pc}, "the mask of %s names a lane that has exited", name_of(op)));
  return mask & warp->live;
}

}  // namespace

int block_barrier(Vote vote, int predicate, Site site) {
  const void* pc = __builtin_return_address(0);
  Fiber* me = running;
  Block* block = me->block;
  const int phase = block->phase & 1;
  release(block->tags[phase]);
  if (block->live != static_cast<int>(block->fibers.size()))
    fail(make_finding("divergence", {pc}, "barrier in divergent code: %s waits, but other threads of the block have exited",
                      name_of(me).text));
  if (block->waiting == 0) {
    block->votes[phase] = vote == Vote::all;
    block->site = site;
    block->pc = pc;
  } else if (!(block->site == site)) {
    fail(make_finding("divergence", {pc, block->pc},
                      "barrier in divergent code: threads of one block wait at different barriers"));
  }
  int& result = block->votes[phase];
  if (vote == Vote::count) result += predicate != 0;
  if (vote == Vote::all) result &= predicate != 0;
  if (vote == Vote::any) result |= predicate != 0;
  if (++block->waiting == block->live) {
    block->waiting = 0;
    block->phase++;
    made_progress();
    for (Fiber* fiber : block->fibers) make_ready(fiber);
  }
  wait();
  acquire(block->tags[phase]);
  return block->votes[phase];
}

const Lanes& warp_meet(unsigned mask, WarpOp op, const void* mine, size_t bytes) {
  return meet(mask, op, mine, bytes, __builtin_return_address(0));
}

const Lanes& meet(unsigned mask, WarpOp op, const void* mine, size_t bytes, const void* pc) {
  Fiber* me = running;
  const int lane = me->context.lane;
  mask = check_mask(me->warp, mask, lane, op, pc);
  Meeting* meeting = meeting_for(me->warp, mask, op, pc);
  const int generation = meeting->generation & 1;
  if (bytes) std::memcpy(meeting->lanes[generation].data[lane], mine, bytes);
  if (op == WarpOp::sync) release(meeting->tags[generation]);
  meeting->arrived |= 1u << lane;
  if (meeting->arrived == mask) complete(meeting, me->block, me->warp);
  wait();
  if (op == WarpOp::sync) acquire(meeting->tags[generation]);
  return meeting->lanes[generation];
}

unsigned active_lanes() { return running->warp->live; }

void lane_exits(Fiber* fiber) {
  Warp* warp = fiber->warp;
  const unsigned bit = 1u << fiber->context.lane;
  if (!fiber->copies.empty())
    fail(make_finding("async-copy", {fiber->copies[0].pc}, "%s exits with cp.async copies it never waited for", name_of(fiber).text));
  if (fiber->block->waiting)
    fail(make_finding("divergence", {fiber->block->pc}, "barrier in divergent code: %s exits while other threads wait",
                      name_of(fiber).text));
  warp->live &= ~bit;
  for (Meeting* meeting : warp->meetings) {
    if (!meeting->arrived || !(meeting->mask & bit)) continue;
    if (meeting->op != WarpOp::sync)
      fail(make_finding("warp-mask", {meeting->pc}, "the mask of %s names a lane that has exited", name_of(meeting->op)));
    meeting->mask &= ~bit;
    if (meeting->arrived == meeting->mask) complete(meeting, fiber->block, warp);
  }
}

}  // namespace emu
