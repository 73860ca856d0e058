"""Runs translated kernels: waves of blocks in lockstep, split where blocks disagree about a branch."""

from collections import Counter, deque

import numpy as np

from .errors import Finding
from .memory import BlockMemory
from .parser import parse
from .translate import Translation, is_barrier

# Lanes per wave: enough to hide the cost of a numpy call, few enough to stay in the cache.
WAVE_LANES = 8192
# Basic blocks a wave runs before the others get their turn, so that a spinning one does not starve them.
_SLICE = 512
_SPINS = 4_000
# `waiting` of threads that spin on a barrier in memory; other numbers are hardware barriers.
_FOR_MEMORY = 127
_DONE = np.iinfo(np.int32).max


class Wave:
    """Blocks of a grid in lockstep. `lane_pc` is None while all their threads are at block `pc`."""

    def __init__(self, program, launch, rows, memory, shared, local, counters):
        self.program, self.launch, self.rows = program, launch, rows
        self.memory, self.shared, self.local, self.counters = memory, shared, local, counters
        self.registers = list(launch.registers)
        self.pc, self.lane_pc, self.waiting = 0, None, None
        self.copies, self.copies_committed = [], np.zeros((1, 1), np.int64)
        self.seen_version = 0
        self._place()

    def _place(self):
        launch, threads = self.launch, self.launch.threads
        self.shape = (len(self.rows), threads)
        slot = (self.rows - launch.first)[:, None]
        self.shared_base = slot * self.shared.pitch
        lane = np.arange(threads)[None, :]
        self.local_base = (slot * threads + lane) * self.local.pitch if self.local else None
        x, y, z = launch.grid
        block = self.rows[:, None]
        ids = {"x": block % x, "y": block // x % y, "z": block // (x * y)}
        special = {"tid.x": lane, "tid.y": 0, "tid.z": 0, "ntid.x": threads, "ntid.y": 1, "ntid.z": 1}
        special |= {"laneid": lane % 32, "warpid": lane // 32, "nwarpid": threads // 32, "nsmid": 1}
        special |= {f"ctaid.{d}": v for d, v in ids.items()}
        special |= {f"nctaid.{d}": v for d, v in zip("xyz", launch.grid)}
        special |= {f"cluster_{n}": v for n, v in (("ctarank", 0), ("nctarank", 1))}
        special |= dict.fromkeys(("smid", "clock", "clock_hi", "clock64", "globaltimer", "gridid", "cluster_ctaid.x"), 0)
        special |= {f"lanemask_{n}": m for n, m in _lane_masks(lane % 32).items()}
        self.special = {k: np.atleast_2d(np.asarray(v)).astype(np.uint32) for k, v in special.items()}

    def parameter(self, name, offset, size):
        raw = self.launch.parameters[name][offset : offset + size]
        return np.frombuffer(raw, f"u{size}").reshape(1, 1)

    def finding(self, kind, i, detail="", where=None):
        """A Finding that names the first block and thread concerned."""
        place = ""
        if where is not None and where.ndim == 2:
            row, lane = np.argwhere(where)[0]
            place = f"block {self.launch.block_of(self.rows[row if where.shape[0] > 1 else 0])}"
            place += f", thread {lane}" if where.shape[1] == self.shape[1] else ""
        return Finding(kind, self.program.kernel.name, i, "; ".join(filter(None, (detail, place))))

    def advance(self, count, mask):
        return count + 1 if mask is None else count + mask

    def step(self):
        """Run one basic block; returns the waves that go on (this one, or its parts)."""
        blocks = self.program.translation.blocks
        if self.lane_pc is not None:
            return self._step_divergent(blocks)
        block = blocks[self.pc]
        taken = block.run(self, self.registers, None)
        self.launch.executed[block.index] += self.shape[0] * self.shape[1] // 32
        jump = block.jump
        if jump is None or is_barrier(jump):
            self.pc += 1
        elif jump.name == "trap":
            raise self.finding("trap", jump, "", np.broadcast_to(True if taken is None else taken, self.shape))
        elif jump.name == "bra":
            if block.spins and taken.any():
                # Every thread waits, and copies complete when issued.
                raise self.finding("deadlock", jump, "no thread is left to complete this barrier", np.broadcast_to(taken, self.shape))
            return self._branch(block.target, taken)
        else:
            return [] if taken is None else self._branch(_DONE, taken)
        return [self] if self.pc < len(blocks) else []

    def _branch(self, target, taken):
        if taken is None or taken.all():
            self.pc = target
        elif not taken.any():
            self.pc += 1
        else:
            lanes = np.broadcast_to(taken, self.shape)
            all_taken, none_taken = lanes.all(1), ~lanes.any(1)
            mixed = ~(all_taken | none_taken)
            parts = [(p, mask) for p, mask in ((target, all_taken), (self.pc + 1, none_taken), (None, mixed)) if mask.any()]
            waves = []
            for pc, chosen in parts:
                wave = self if chosen.all() else self.part(chosen, (target, self.pc + 1) if pc is None else (pc,))
                if pc is None:
                    wave.lane_pc = np.where(lanes[chosen], target, self.pc + 1).astype(np.int32)
                    wave.waiting = np.full(wave.shape, -1, np.int8)
                else:
                    wave.pc = pc
                waves.append(wave)
            return [w for w in waves if w.lane_pc is not None or w.pc < len(self.program.translation.blocks)]
        return [self] if self.pc < len(self.program.translation.blocks) else []

    def part(self, chosen, places):
        """A wave of some of the blocks that goes on at one of `places`, with its own registers."""
        wave = object.__new__(Wave)
        wave.__dict__.update(self.__dict__)
        wave.rows = self.rows[chosen]
        wave._place()

        def pick(value):
            return value[chosen] if value.shape[0] == len(chosen) else value

        blocks = self.program.translation.blocks
        wave.registers = list(self.launch.registers)
        for slot in {slot for pc in places if pc < len(blocks) for slot in blocks[pc].live_in}:
            wave.registers[slot] = pick(self.registers[slot])
        wave.copies_committed = pick(self.copies_committed)
        wave.copies = [(pick(g), pick(word), count, pick(lanes)) for g, word, count, lanes in self.copies]
        return wave

    def _step_divergent(self, blocks):
        """Threads of a block at different places: run those that are furthest behind."""
        barriers = self.shared.barriers
        if barriers is not None and barriers.version != self.seen_version:
            self.seen_version = barriers.version
            self.waiting[self.waiting == _FOR_MEMORY] = -1
        runnable = (self.waiting < 0) & (self.lane_pc < len(blocks))
        if not runnable.any():
            if (self.lane_pc >= len(blocks)).all():
                return []
            raise self._deadlock(blocks)
        pc = int(self.lane_pc[runnable].min())
        lanes = runnable & (self.lane_pc == pc)
        block = blocks[pc]
        taken = block.run(self, self.registers, lanes)
        self.launch.executed[pc] += int(lanes.reshape(-1, 32).any(1).sum())
        jump, taken = block.jump, lanes if taken is None else lanes & taken
        if block.spins:
            self.waiting[taken] = _FOR_MEMORY
            self.lane_pc[lanes & ~taken] = pc + 1
            return self._converge()
        self.lane_pc[lanes] = pc + 1
        if jump is not None and is_barrier(jump):
            self.waiting[lanes] = int(jump.args[0])
            return self._release(blocks)
        if jump is not None and jump.name == "trap" and taken.any():
            raise self.finding("trap", jump, "", taken)
        if jump is not None:
            self.lane_pc[taken] = block.target if jump.name == "bra" else _DONE
            if jump.name != "bra":
                # Barriers do not wait for threads that have left.
                return self._release(blocks)
        return self._converge()

    def _release(self, blocks):
        """Let the threads go whose barrier is complete: as many as it names have arrived, or all that still run."""
        alive = self.lane_pc < len(blocks)
        for number in np.unique(self.waiting[alive & (self.waiting >= 0) & (self.waiting != _FOR_MEMORY)]):
            here = (self.waiting == number) & alive
            needed = alive.sum(1)
            for pc in np.unique(self.lane_pc[here]):
                jump = blocks[int(pc) - 1].jump
                if len(jump.args) > 1:
                    needed = np.where((here & (self.lane_pc == pc)).any(1), int(jump.args[1]), needed)
            self.waiting[here & (here.sum(1) >= needed)[:, None]] = -1
        return self._converge()

    def _deadlock(self, blocks):
        stuck = (self.lane_pc < len(blocks)) & (self.waiting >= 0)
        row = int(np.argwhere(stuck)[0][0])
        lane = int(stuck[row].argmax())
        pc = int(self.lane_pc[row, lane])
        # A hardware barrier ends its basic block, a spinning wait is its own.
        jump = blocks[pc if self.waiting[row, lane] == _FOR_MEMORY else pc - 1].jump
        return self.finding("deadlock", jump, f"{int((stuck & (self.lane_pc == pc))[row].sum())} threads wait here for others that never arrive", stuck)

    def _converge(self):
        pc = int(self.lane_pc.flat[0])
        if (self.lane_pc == pc).all() and (self.waiting < 0).all():
            self.pc, self.lane_pc, self.waiting = pc, None, None
            return [self] if pc < len(self.program.translation.blocks) else []
        return [self]


def _lane_masks(lane):
    bit = np.uint64(1) << lane.astype(np.uint64)
    below = bit - np.uint64(1)
    return {"eq": bit, "lt": below, "le": below | bit, "gt": ~(below | bit) & np.uint64(0xFFFFFFFF), "ge": ~below & np.uint64(0xFFFFFFFF)}


class Launch:
    """One launch: its parameters, its counters and the blocks it has still to run."""

    def __init__(self, program, grid, arguments, threads, shared_bytes):
        self.grid = tuple(grid) + (1,) * (3 - len(grid))
        self.threads = program.kernel.threads or threads
        if not self.threads or self.threads % 32:
            raise ValueError(f"{program.kernel.name}: {self.threads} threads per block; pass threads=, a multiple of 32")
        self.parameters = _pack(program.kernel, arguments)
        self.shared_bytes = program.kernel.shared_bytes + shared_bytes
        self.registers = program.translation.undefined_registers()
        self.executed = Counter()
        self.first = 0

    def block_of(self, row):
        x, y, _ = self.grid
        return (int(row) % x, int(row) // x % y, int(row) // (x * y))

    @property
    def blocks(self):
        x, y, z = self.grid
        return x * y * z


def _pack(kernel, arguments):
    """Bytes of every parameter; the scratch pointers that Triton appends may be left out."""
    arguments = list(arguments) + [0] * (len(kernel.params) - len(arguments))
    packed = {}
    for (name, (kind, _)), value in zip(kernel.params.items(), arguments):
        if isinstance(value, bytes):
            packed[name] = value
        elif kind[0] == "f":
            packed[name] = np.array([value], f"f{int(kind[1:]) // 8}").tobytes()
        else:
            packed[name] = (int(value) % (1 << int(kind[1:]))).to_bytes(int(kind[1:]) // 8, "little")
    return packed


class Program:
    """A kernel of a PTX module, ready to run any number of times."""

    def __init__(self, ptx, name=None):
        kernels = parse(ptx)
        if name is None and len(kernels) != 1:
            raise ValueError(f"the module has the kernels {', '.join(kernels)}: pass name=")
        self.kernel = kernels[name or next(iter(kernels))]
        self.translation = Translation(self.kernel)
        self.async_proxy = any(i.name == "wgmma" or "bulk" in i.parts for i in self.kernel.instructions)

    def run(self, grid, arguments, memory, *, threads=None, shared_bytes=0, counters=None):
        """Execute every block. `arguments` are numbers (pointers as `memory` gave them) or bytes, in parameter order."""
        launch = Launch(self, grid, arguments, threads, shared_bytes)
        for name, address in self.kernel.data_addresses.items():
            memory.place(name, address, self.kernel.data.get(name) or launch.parameters[name])
        resident = max(1, min(launch.blocks, WAVE_LANES // launch.threads))
        with np.errstate(all="ignore"):
            for first in range(0, launch.blocks, resident):
                launch.first = first
                self._run_resident(launch, np.arange(first, min(first + resident, launch.blocks)), memory, counters)
        return launch

    def _run_resident(self, launch, rows, memory, counters):
        shared = BlockMemory(len(rows), launch.shared_bytes, self.async_proxy)
        local_bytes = self.kernel.local_bytes
        local = BlockMemory(len(rows) * launch.threads, local_bytes) if local_bytes else None
        waves = deque([Wave(self, launch, rows, memory, shared, local, counters)])
        slices = 0
        while waves:
            running = [waves.popleft()]
            for _ in range(_SLICE):
                wave = running.pop()
                running += wave.step()
                if not running:
                    break
            waves.extend(running)
            slices += 1
            if slices > _SPINS * max(1, len(waves)):
                jump = self.kernel.instructions[self.translation.blocks[waves[0].pc].end - 1]
                raise waves[0].finding("no end in sight", jump, f"{slices * _SLICE} basic blocks were run")

