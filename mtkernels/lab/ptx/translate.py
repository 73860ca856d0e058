"""PTX instructions -> one Python function per basic block, compiled once per kernel."""

from dataclasses import dataclass

import numpy as np

from . import instructions_alu, instructions_hopper, instructions_memory, instructions_warp, numerics
from .errors import Unsupported
from .writer import Writer, local, storage_types

EMITTERS = {
    **instructions_alu.EMITTERS,
    **instructions_memory.EMITTERS,
    **instructions_warp.EMITTERS,
    **instructions_hopper.EMITTERS,
}
_JUMPS = ("bra", "ret", "exit", "trap")


@dataclass
class Block:
    """run(state, registers, mask) executes instructions [start, end) and returns the lanes that take the jump (None: all)."""

    index: int
    start: int
    end: int
    jump: object = None
    target: int = -1
    run: object = None
    live_in: tuple = ()


def is_barrier(i):
    return i.name in ("bar", "barrier") and "warp" not in i.parts and "cluster" not in i.parts


def is_wait(i):
    """Lanes stay at this instruction until the barrier in memory completes."""
    return i.name == "mbarrier" and i.parts[1] in ("try_wait", "test_wait")


def split(kernel):
    """Basic blocks, ended by a jump, a barrier or the next label."""
    instructions = kernel.instructions
    leaders = {0, *kernel.labels.values()}
    for i in instructions:
        if i.name in _JUMPS or is_barrier(i):
            leaders.add(i.index + 1)
        if is_wait(i):
            leaders |= {i.index, i.index + 1}
    leaders = sorted(x for x in leaders if x < len(instructions))
    starts = {start: n for n, start in enumerate(leaders)}
    blocks = []
    for n, (start, end) in enumerate(zip(leaders, [*leaders[1:], len(instructions)])):
        block = Block(n, start, end)
        last = instructions[end - 1]
        if last.name in _JUMPS or is_barrier(last) or is_wait(last):
            block.jump = last
        if last.name == "bra":
            block.target = starts.get(kernel.labels[last.args[0]], len(leaders))
        blocks.append(block)
    return blocks


class Translation:
    """Blocks of a kernel with their functions, and the slots of its registers."""

    def __init__(self, kernel):
        kernel.data_addresses = _data_addresses(kernel)
        self.kernel = kernel
        self.storage = storage_types(kernel)
        self.slots = {name: n for n, name in enumerate(self.storage)}
        self.blocks = split(kernel)
        constants = {}
        writers = [self._write(block, constants) for block in self.blocks]
        live_in, live_out = self._liveness(writers)
        source = []
        for block, writer in zip(self.blocks, writers):
            source += self._function(block, writer, live_out[block.index])
            block.live_in = tuple(self.slots[r] for r in live_in[block.index])
        self.source = "\n".join(source)
        environment = _environment() | constants | {"I": kernel.instructions}
        exec(compile(self.source, f"<ptx {kernel.name}>", "exec"), environment)
        for block in self.blocks:
            block.run = environment[f"block_{block.index}"]

    def _write(self, block, constants):
        writer = Writer(self.kernel, self.storage, constants)
        for i in self.kernel.instructions[block.start : block.end]:
            writer.start(i)
            if i.name in _JUMPS or is_barrier(i):
                continue
            if i.name not in EMITTERS:
                raise Unsupported(i)
            EMITTERS[i.name](writer, i)
        return writer

    def _liveness(self, writers):
        count = len(self.blocks)
        live_in, live_out = [set(w.uses) for w in writers], [set() for _ in writers]
        for block, writer in zip(self.blocks, writers):
            if block.jump is not None and block.jump.guard and block.jump.guard not in writer.defs:
                live_in[block.index].add(block.jump.guard)
        changed = True
        while changed:
            changed = False
            for block in reversed(self.blocks):
                n = block.index
                after = set()
                for successor in self._successors(block):
                    if successor < count:
                        after |= live_in[successor]
                if after != live_out[n]:
                    live_out[n], changed = after, True
                    # A masked definition keeps the other lanes, so it does not end the life of the old value.
                    live_in[n] |= after - writers[n].defs
        return live_in, live_out

    def _successors(self, block):
        jump = block.jump
        if jump is None or is_barrier(jump) or is_wait(jump):
            return [block.index + 1]
        following = [block.index + 1] if jump.guard else []
        return following + ([block.target] if jump.name == "bra" else [])

    def _function(self, block, writer, live_out):
        slots, jump = self.slots, block.jump
        taken = "None"
        if jump is not None and jump.guard and not is_wait(jump):
            writer.start(jump)
            taken = writer.guard
        lines = [f"{local(r)} = R[{slots[r]}]" for r in sorted(writer.uses)]
        lines += writer.lines
        kept = [(slots[r], local(r)) for r in sorted(writer.defs & live_out)]
        if kept:
            lines.append("if m is None:")
            lines += [f"    R[{slot}] = {name}" for slot, name in kept]
            lines.append("else:")
            lines += [f"    R[{slot}] = where(m, {name}, R[{slot}])" for slot, name in kept]
        lines.append(f"return {taken}" if not (jump is not None and is_wait(jump)) else "return ready")
        return [f"def block_{block.index}(s, R, m):", *(f"    {line}" for line in lines)]

    def undefined_registers(self):
        """Initial registers: all bits set, so that a value nobody wrote shows."""
        return [np.full((1, 1), 255, "u1").repeat(max(1, _size(t)), 1).view(t) if t != "?" else np.zeros((1, 1), bool) for t in self.storage.values()]


def _size(dtype):
    return np.dtype(dtype).itemsize


def _data_addresses(kernel):
    """Module-level arrays live in an address range of their own."""
    addresses, position = {}, 1 << 60
    for name, raw in kernel.data.items():
        addresses[name] = position
        position += -(-len(raw) // 256) * 256 + 4096
    return addresses


def both(mask, guard):
    if mask is None or guard is None:
        return guard if mask is None else mask
    return mask & guard


def _environment():
    types = {f"{kind}{size}": np.dtype(f"{kind}{size}") for kind, sizes in (("u", (1, 2, 4, 8)), ("i", (1, 2, 4, 8)), ("f", (2, 4, 8))) for size in sizes}
    runtime = {}
    for module in (numerics, instructions_memory, instructions_warp, instructions_hopper):
        runtime |= {k: v for k, v in vars(module).items() if callable(v) and not k.startswith("_")}
    return runtime | types | {"np": np, "where": np.where, "both": both, "FP8": numerics.FP8}
