"""Innermost loops of machine code, from its branches alone."""

from typing import NamedTuple


class Instruction(NamedTuple):
    # Opcode without modifiers.
    op: str
    # Label it may jump to, or None.
    target: str | None = None
    falls_through: bool = True
    # Cycles from its issue to that of the warp's next instruction at the least; None when the code does not say.
    cycles: int | None = None
    # Bytes that a lane asks of global memory, and those that it moves through shared memory; 0 on AMD.
    loaded: int = 0
    shared: int = 0


def innermost_loops(code, labels, is_wait=lambda body: False):
    """Bodies (lists of instructions) of the natural loops that hold no other loop, in order of their first instruction.

    labels: name -> index in `code`. Loops for which is_wait(body) holds, such as polls of a barrier, are taken out of the
    loop around them rather than reported. Code that the first instruction does not reach is ignored.
    """
    blocks, successors = _blocks(code, labels)
    loops = _natural_loops(successors)
    waits = {head for head, body in loops.items() if is_wait([code[i] for b in body for i in blocks[b]])}
    polls = set().union(*(loops[head] for head in waits))
    found = []
    for head, body in sorted(loops.items()):
        if head not in waits and not any(other in body for other in loops if other != head and other not in waits):
            found.append([code[i] for b in sorted(body - polls) for i in blocks[b]])
    return found


def _blocks(code, labels):
    """([range of instructions], [blocks that may follow]) of the basic blocks."""
    starts = {0, *labels.values(), *(i + 1 for i, ins in enumerate(code) if ins.target or not ins.falls_through)}
    starts = sorted(s for s in starts if s < len(code))
    number = {start: block for block, start in enumerate(starts)}
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)])]
    successors = []
    for block in blocks:
        last = code[block[-1]]
        after = [labels.get(last.target)] + [block[-1] + 1] * last.falls_through
        successors.append([number[i] for i in after if i in number])
    return blocks, successors


def _natural_loops(successors):
    """{head: blocks} where an edge into the head comes from a block that the head dominates."""
    order = _reverse_postorder(successors)
    before = {block: [] for block in order}
    for block in order:
        for after in successors[block]:
            before[after].append(block)
    dominators = _dominators(order, before)
    loops = {}
    for block in order:
        for head in successors[block]:
            if head in dominators[block]:
                body, work = loops.setdefault(head, {head}), [block]
                while work:
                    member = work.pop()
                    if member not in body:
                        body.add(member)
                        work += before[member]
    return loops


def _reverse_postorder(successors):
    if not successors:
        return []
    order, seen, stack = [], {0}, [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((b for b in rest if b not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return order[::-1]


def _dominators(order, before):
    dominators = {block: set(order) for block in order}
    dominators.update({block: {block} for block in order[:1]})
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(dominators[b] for b in before[block])) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators
