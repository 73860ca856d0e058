"""A static model of what a tile configuration costs, to rank those of one kernel on one GPU: a bound, not measured.

A kernel is one or more kinds of programs (`Pass`), each a loop over tiles. What bounds an iteration is read from the machine
code (`resources`), the occupancy and the tile; what bounds the launch, from the number of programs at a reference shape.

Cards: NVIDIA's data sheets and white papers (A100 80GB SXM, GeForce RTX 3090, H100 SXM, B200, GeForce RTX 5090); products in 16
bits with sums in float32, dense. Clocks are the boost clocks that go with those peaks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from math import ceil, log, prod


@dataclass(frozen=True)
class Card:
    """Multiprocessors, cycles/s, memory bytes/s, matrix FLOP/s in 16 bits."""

    multiprocessors: int
    clock: float
    bandwidth: float
    flops: float


# The GPU that each column of configs/*.json is tuned for.
CARDS = {
    "sm_80": Card(108, 1.41e9, 2.039e12, 312e12),
    "sm_86": Card(82, 1.695e9, 0.936e12, 71e12),
    "sm_90": Card(132, 1.83e9, 3.35e12, 989.5e12),
    "sm_100": Card(148, 1.856e9, 8e12, 2250e12),
    "sm_120": Card(170, 2.407e9, 1.792e12, 209.5e12),
}

# Assumed for every card: a load's latency under traffic, about twice the 470 to 540 cycles of an idle A100, H100 or RTX 4090
# (Luo et al., arXiv 2402.13499).
LATENCY = 800e-9
# A program's first product waits for the plan and then for its first rows.
_START = 2 * LATENCY
_SCHEDULERS = 4
# Bytes a cycle that a multiprocessor takes from L2 at most, and those that its shared memory moves.
_L2_PORT = 64
_SHARED_PORT = 128
# Terms overlap, but not wholly: they are added up as a norm of this power, an assumption. Infinity would be a strict bound.
_OVERLAP = 4
# Loops of a kernel among which those of its passes are looked for.
_CHOICES = 8
TERMS = ("issue", "warp", "latency", "memory", "L2", "shared", "tensor")


@dataclass(frozen=True)
class Pass:
    """Programs of one kind at the reference shape, as functions of the options where these matter.

    memory: bytes that all of them take from memory at the least, each once. programs(options): how many there are.
    step: the option by which the loop advances over `length` columns or rows; None where a program is one tile and no loop.
    tile: the options whose product is the elements of rows in an iteration (or in the program).
    factors: for each loop in the code, (columns of the other operand: a number or an option, divisor of `step` there).
    gemm: whether the loop's tensor FLOPs count, tile times columns; elsewhere they are far from the peak.
    """

    memory: int
    programs: Callable
    tile: tuple
    step: str | None = None
    length: int = 1
    factors: tuple = ((0, 1),)
    gemm: bool = False


@dataclass(frozen=True)
class Estimate:
    """Seconds: each term as if it were alone, the start of programs, and `score`, which ranks. Bounds, not measured."""

    terms: dict
    start: float
    score: float

    @property
    def limit(self):
        """What bounds it most."""
        all_terms = {**self.terms, "start": self.start}
        return max(all_terms, key=all_terms.get)

    def __add__(self, other):
        terms = {name: seconds + other.terms[name] for name, seconds in self.terms.items()}
        return Estimate(terms, self.start + other.start, self.score + other.score)

    def scaled(self, factor):
        return Estimate({k: v * factor for k, v in self.terms.items()}, self.start * factor, self.score * factor)


def estimate(found, passes, options, element_bytes):
    """Estimate of one launch. found: Resources of the kernel with these options, on a target of CARDS; it must fit there."""
    passes = list(passes)
    programs = [part.programs(options) for part in passes]
    loops = iter(_loops(found, [_tile(part, options, *f)[1] * element_bytes for part in passes if part.step for f in part.factors]))
    return _sum(_pass(found, part, options, element_bytes, n, sum(programs), loops) for part, n in zip(passes, programs))


def _sum(estimates):
    first, *rest = estimates
    return sum(rest, first)


def _pass(found, part, options, element_bytes, programs, launched, loops):
    """The mean over the loops that a pass has in the code, one for each bucket of ranks, of its share of the launch."""
    demands = [_demand(found, part, options, element_bytes, loops, *factor) for factor in part.factors]
    made = _sum(_launch(found, options["num_warps"], launched, part.memory / programs, demand) for demand in demands)
    return made.scaled(programs / launched / len(demands))


def _tile(part, options, columns, divisor):
    """(elements of rows, elements of both operands, step) of an iteration."""
    rows = prod(options[name] for name in part.tile) // divisor
    step = options[part.step] // divisor if part.step else 1
    return rows, rows + step * options.get(columns, columns), step


def _demand(found, part, options, element_bytes, loops, columns, divisor):
    rows, elements, step = _tile(part, options, columns, divisor)
    if part.step is None:
        return _Demand(found.instructions, found.instructions, 2 * rows * element_bytes, 0, 0, 1, 1)
    loop, lanes = next(loops), 32 * options["num_warps"]
    flops = 2 * rows * options.get(columns, columns) * part.gemm
    asked = loop.loaded * lanes or elements * element_bytes
    return _Demand(loop.instructions, loop.cycles, asked, loop.shared * lanes, flops, options["num_stages"], ceil(part.length / step))


def _loops(found, expected):
    """For each number of bytes expected of an iteration a loop whose loads come close; of equal choices that in code order.

    Only tensor-core loops where there are any. No loop stands for two while there are enough of them.
    """
    lanes = 32 * found.num_warps
    loops = [loop for loop in found.loops if loop.tensor_cores] or list(found.loops)
    loops = [loop for loop in loops if loop.loaded]
    if not loops:
        return [found.hot_loop] * len(expected)

    def distance(loop, size):
        return abs(log(loop.loaded * lanes / size))

    if len(loops) < len(expected):
        return [min(loops, key=lambda loop: distance(loop, size)) for size in expected]
    near = sorted(range(len(loops)), key=lambda i: min((distance(loops[i], size) for size in expected), default=0))[:_CHOICES]

    def cost(order):
        apart = sum(distance(loops[i], size) for i, size in zip(order, expected))
        return round(apart, 6), sum(a > b for a, b in zip(order, order[1:]))

    return [loops[i] for i in min(permutations(sorted(near), len(expected)), key=cost)]


@dataclass(frozen=True)
class _Demand:
    """Of one iteration of one program; instructions and cycles of each of its warps."""

    instructions: int
    cycles: int
    bytes_asked: int
    shared: int
    flops: int
    stages: int
    iterations: int


def _launch(found, num_warps, programs, memory, demand):
    """Whole waves of programs, each taking `memory` bytes of it, then the last wave, which shares it with fewer."""
    card = CARDS[found.target]
    per_wave = found.occupancy.blocks * card.multiprocessors
    waves, rest = divmod(programs, per_wave)
    total = Estimate(dict.fromkeys(TERMS, 0.0), 0.0, 0.0)
    for count, n in ((waves, per_wave), (1, rest)):
        if count and n:
            traffic = n * memory / demand.iterations
            wave = _wave(card, num_warps, ceil(n / card.multiprocessors), traffic, demand)
            total += wave.scaled(count)
    return total


def _wave(card, num_warps, resident, traffic, demand):
    """From start to end: `resident` programs on a multiprocessor, `traffic` bytes of memory for one iteration of all of them."""
    pipelined = demand.stages > 1
    waiting = LATENCY / (demand.stages - 1) if pipelined else LATENCY + demand.cycles / card.clock
    terms = dict(
        issue=resident * num_warps * demand.instructions / _SCHEDULERS / card.clock,
        warp=demand.cycles / card.clock,
        latency=waiting,
        memory=traffic / card.bandwidth,
        L2=resident * demand.bytes_asked / _L2_PORT / card.clock,
        shared=resident * demand.shared / _SHARED_PORT / card.clock,
        tensor=resident * demand.flops * card.multiprocessors / card.flops,
    )
    round_trip = sum(seconds**_OVERLAP for seconds in terms.values()) ** (1 / _OVERLAP)
    return Estimate({k: v * demand.iterations for k, v in terms.items()}, _START, _START + round_trip * demand.iterations)
