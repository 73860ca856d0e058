"""PTX instructions -> one Python function per basic block, compiled once per kernel."""

from dataclasses import dataclass

import numpy as np

from . import async_proxy, instructions_alu, instructions_carry, instructions_hopper, instructions_memory, instructions_warp, numerics
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
    # repeats itself until a barrier in memory completes
    spins: bool = False
    run: object = None
    live_in: tuple = ()


def is_barrier(i):
    return i.name in ("bar", "barrier") and "warp" not in i.parts and "cluster" not in i.parts


def split(kernel):
    """Basic blocks, ended by a jump, a barrier or the next label."""
    instructions = kernel.instructions
    leaders = {0, *kernel.labels.values()}
    for i in instructions:
        if i.name in _JUMPS or is_barrier(i):
            leaders.add(i.index + 1)
    leaders = sorted(x for x in leaders if x < len(instructions))
    starts = {start: n for n, start in enumerate(leaders)}
    blocks = []
    for n, (start, end) in enumerate(zip(leaders, [*leaders[1:], len(instructions)])):
        block = Block(n, start, end)
        last = instructions[end - 1]
        if last.name in _JUMPS or is_barrier(last):
            block.jump = last
        if last.name == "bra":
            block.target = starts.get(kernel.labels[last.args[0]], len(leaders))
            waits = any(i.name == "mbarrier" and i.parts[1] in ("try_wait", "test_wait") for i in instructions[start:end])
            block.spins = waits and block.target == n and last.guard is not None
        blocks.append(block)
    return blocks


class Translation:
    """Blocks of a kernel with their functions, and the slots of its registers."""

    def __init__(self, kernel):
        kernel.data_addresses = _data_addresses(kernel)
        self.kernel = kernel
        self.storage = storage_types(kernel) | {instructions_carry.CARRY: "u4"}
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
            if is_barrier(i) and ("arrive" in i.parts or "red" in i.parts):
                raise Unsupported(i, "of the block barriers only sync is modelled")
            if i.name in _JUMPS or is_barrier(i):
                continue
            emit = instructions_carry.emit if instructions_carry.is_extended(i) else EMITTERS.get(i.name)
            if emit is None:
                raise Unsupported(i)
            emit(writer, i)
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
        if jump is None or is_barrier(jump):
            return [block.index + 1]
        following = [block.index + 1] if jump.guard else []
        return following + ([block.target] if jump.name == "bra" else [])

    def _function(self, block, writer, live_out):
        slots, jump = self.slots, block.jump
        taken = "None"
        if jump is not None and jump.guard:
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
        lines.append(f"return {taken}")
        return [f"def block_{block.index}(s, R, m):", *(f"    {line}" for line in lines)]

    def undefined_registers(self):
        """Initial registers: all bits set, so that a value nobody wrote shows."""
        values = {t: np.full((1, np.dtype(t).itemsize), 255, "u1").view(t) for t in set(self.storage.values()) - {"?"}}
        values["?"] = np.zeros((1, 1), bool)
        return [values[t] for t in self.storage.values()]


def _data_addresses(kernel):
    """Module-level arrays and parameters that are read by address (tensor maps, members of a tuple) get address ranges of their own."""
    addresses, position = {}, 1 << 60
    for name, raw in kernel.data.items():
        addresses[name] = position
        position += -(-len(raw) // 256) * 256 + 4096
    # Addresses of parameters must fit 32 bits.
    taken = {arg for i in kernel.instructions if i.name == "mov" for arg in i.args}
    read = [name for name, (_, elements) in kernel.params.items() if elements > 1 or name in taken]
    return addresses | {name: 4096 * (n + 1) for n, name in enumerate(read)}


def both(mask, guard):
    if mask is None or guard is None:
        return guard if mask is None else mask
    return mask & guard


def _environment():
    types = {f"{kind}{size}": np.dtype(f"{kind}{size}") for kind, sizes in (("u", (1, 2, 4, 8)), ("i", (1, 2, 4, 8)), ("f", (2, 4, 8))) for size in sizes}
    runtime = {}
    for module in (numerics, instructions_carry, async_proxy, instructions_memory, instructions_warp, instructions_hopper):
        runtime |= {k: v for k, v in vars(module).items() if callable(v) and not k.startswith("_")}
    return runtime | types | {"np": np, "where": np.where, "both": both, "FP8": numerics.FP8}
