"""Compile Triton kernels for GPUs that are not there, and read what each would use of them.

    found = measure(my_kernel, "sm_90", {"x_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 1024}, {"num_warps": 4})
    print(table([("my_kernel", found)]))

Nothing is executed, so nothing here is a time. `matrix` measures what the package ships, `budgets` guards it.
"""

from collections import Counter
from dataclasses import dataclass

from . import amdgcn, sass
from .control_flow import innermost_loops
from .interpreter import interpreting
from .occupancy import TARGETS, TENSOR_CORES, gpu, occupancy
from .tensor_memory import tensor_memory

__all__ = ["TARGETS", "Loop", "Resources", "measure", "measure_case", "problems", "table"]


@dataclass(frozen=True)
class Loop:
    """An innermost loop: instructions of its body, and the cycles in which a warp issues them; None on AMD.

    loaded, shared: bytes that each lane loads from global memory and moves through shared memory in one pass, by the widths
    of the instructions (LDG, LDGSTS; LDS, LDSM, STS, STSM, LDGSTS); TMA copies are not in them. 0 on AMD.
    """

    instructions: int
    cycles: int | None
    tensor_cores: int
    loaded: int = 0
    shared: int = 0


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. Sizes in bytes; instructions are counted in the code, not as executed."""

    target: str
    # Per thread; on AMD vector and accumulation registers together.
    registers: int
    # Per wave; 0 on NVIDIA.
    scalar_registers: int
    # Of `registers`; 0 on NVIDIA.
    accumulation_registers: int
    # Per thread: local memory on NVIDIA, scratch on AMD.
    stack: int
    # NVIDIA: loads and stores of local memory. AMD: spilled vector registers.
    spills: int
    # AMD: scalar registers kept in lanes of vector registers.
    scalar_spills: int
    shared: int
    num_warps: int
    instructions: int
    # {opcode: count}
    tensor_cores: dict
    tma: dict
    # Columns, accumulators and those that a chain of dots does not need; 0 where there is no tensor memory.
    tensor_memory: int
    accumulators: int
    doubled_accumulators: int
    loops: tuple

    @property
    def occupancy(self):
        return occupancy(
            self.target,
            registers=self.registers,
            shared=self.shared,
            num_warps=self.num_warps,
            scalar_registers=self.scalar_registers,
            tensor_memory=self.tensor_memory,
        )

    @property
    def hot_loop(self):
        """The innermost loop with most tensor-core instructions, then most cycles or instructions; None without loops."""
        return max(self.loops, key=lambda loop: (loop.tensor_cores, loop.cycles or loop.instructions), default=None)


def measure(kernel, target, signature, constexprs=None, options=None, aligned=None):
    """Resources of one specialisation of a `@triton.jit` function on `target`, e.g. "sm_90" or "gfx942".

    signature: {argument: "*bf16", "i32", "constexpr", or a tuple of such}, in the order of the arguments; constexprs: their
    values.
    options: num_warps, num_stages, ... as at a launch. aligned: arguments that are multiples of 16, as the JIT would find at
    run time; None takes all pointers. Raises ValueError for an unknown target and whatever the compiler raises.
    """
    compiled = _compile(*_source(kernel, target, signature, constexprs, options, aligned))
    return (_read_amd if target.startswith("gfx") else _read_nvidia)(compiled, target)


def measure_case(case, target):
    """`measure` of a compile case."""
    return measure(case.kernel, target, case.signature, case.constexprs, case.options, case.aligned)


def source_of(case, target):
    """(ASTSource, GPUTarget, options) of a compile case, which tell the compilation apart from others."""
    return _source(case.kernel, target, case.signature, case.constexprs, case.options, case.aligned)


def _source(kernel, target, signature, constexprs, options, aligned):
    device = gpu(target)
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into Python; unset it before importing triton to compile them")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attrs = {}
    for i, (name, kind) in enumerate(signature.items()):
        # Triton counts the members of a tuple by a path.
        members = [((i, j), k) for j, k in enumerate(kind)] if isinstance(kind, tuple) else [((i,), kind)]
        divisible = [path for path, k in members if (k.startswith("*") if aligned is None else name in aligned)]
        attrs |= dict.fromkeys(divisible, [["tt.divisibility", 16]])
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs or {}, attrs=attrs)
    if target.startswith("gfx"):
        return source, GPUTarget("hip", target, device.warp_size), dict(options or {})
    return source, GPUTarget("cuda", int(target[3:]), device.warp_size), dict(options or {})


def _compile(source, target, options):
    import triton

    return triton.compile(source, target=target, options=options)


def _loop(body):
    tensor_cores = sum(i.op in TENSOR_CORES for i in body)
    cycles = None if any(i.cycles is None for i in body) else sum(i.cycles for i in body)
    return Loop(len(body), cycles, tensor_cores, sum(i.loaded for i in body), sum(i.shared for i in body))


def _counts(codes):
    opcodes = Counter(i.op for code, _ in codes for i in code if i.op != "NOP")
    return opcodes, {op: opcodes[op] for op in TENSOR_CORES if opcodes[op]}


def _read_nvidia(compiled, target):
    usage, text = sass.disassemble(compiled.asm["cubin"])
    codes = sass.functions(text)
    opcodes, tensor_cores = _counts(codes)
    memory = tensor_memory(compiled.asm["ttgir"], compiled.asm["ptx"])
    return Resources(
        target=target,
        registers=usage["REG"],
        scalar_registers=0,
        accumulation_registers=0,
        stack=usage["STACK"],
        spills=sum(opcodes[op] for op in sass.SPILLS),
        scalar_spills=0,
        shared=compiled.metadata.shared,
        num_warps=sass.threads(compiled.asm["ptx"]) // 32,
        instructions=opcodes.total(),
        tensor_cores=tensor_cores,
        tma={op: opcodes[op] for op in sass.TMA if opcodes[op]},
        tensor_memory=memory.columns,
        accumulators=memory.accumulators,
        doubled_accumulators=memory.doubled,
        loops=tuple(_loop(body) for code, labels in codes for body in innermost_loops(code, labels, sass.is_poll)),
    )


def _read_amd(compiled, target):
    text = compiled.asm["amdgcn"]
    figures, (code, labels) = amdgcn.metadata(text), amdgcn.function(text)
    opcodes, tensor_cores = _counts([(code, labels)])
    return Resources(
        target=target,
        registers=figures["vgpr_count"],
        scalar_registers=figures["sgpr_count"],
        accumulation_registers=figures["agpr_count"],
        stack=figures["private_segment_fixed_size"],
        spills=figures["vgpr_spill_count"],
        scalar_spills=figures["sgpr_spill_count"],
        shared=compiled.metadata.shared,
        num_warps=figures["max_flat_workgroup_size"] // gpu(target).warp_size,
        instructions=opcodes.total(),
        tensor_cores=tensor_cores,
        tma={},
        tensor_memory=0,
        accumulators=0,
        doubled_accumulators=0,
        loops=tuple(_loop(body) for body in innermost_loops(code, labels)),
    )


def problems(found, tensor_cores=False):
    """What makes a kernel slow or unlaunchable whatever its budget, in words; `tensor_cores`: it has dots that need them."""
    limit, said = gpu(found.target), []
    if found.stack or found.spills:
        what = "spilled registers" if found.target.startswith("gfx") else "spill instructions"
        said.append(f"{found.stack} bytes of stack, {found.spills} {what}")
    if found.scalar_spills > limit.warp_size:  # more than the lanes of one vector register hold
        said.append(f"{found.scalar_spills} spilled scalar registers")
    if found.shared > limit.shared_per_block:
        said.append(f"{found.shared} bytes of shared memory, {found.target} has {limit.shared_per_block}")
    elif not found.occupancy.blocks:
        said.append(f"no block fits: {' and '.join(found.occupancy.limits)}")
    if tensor_cores and not set(limit.tensor_cores) & set(found.tensor_cores):
        instead = ", ".join(found.tensor_cores) or "none"
        said.append(f"no {limit.tensor_cores[0]}: tensor-core instructions are {instead}")
    if found.doubled_accumulators:
        said.append(
            f"{found.doubled_accumulators} accumulators too many in tensor memory: a chain of dots goes from one to another"
            " (one tl.dot per accumulator and iteration, outside `if` and inner loops, avoids it)"
        )
    return said


COLUMNS = ("case", "target", "regs", "sgpr", "stack", "spills", "shared", "warps", "blocks", "occ", "limited by", "tensor cores", "tma", "tmem", "hot loop")


def table(rows):
    """Aligned text of [(name, Resources)]; docs/lab.md says what each column means."""
    lines = [COLUMNS, *(_cells(name, found) for name, found in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    left = {COLUMNS.index(c) for c in ("case", "target", "limited by", "tensor cores", "tma", "tmem", "hot loop")}
    text = ("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in lines)
    return "\n".join(line.rstrip() for line in text)


def _cells(name, found):
    amd, blocks, loop = found.target.startswith("gfx"), found.occupancy, found.hot_loop
    counted = [" ".join(f"{n} {op}" for op, n in counts.items()) or "-" for counts in (found.tensor_cores, found.tma)]
    memory = f"{found.tensor_memory}/{found.accumulators}" if found.tensor_memory else "-"
    hot = "-" if loop is None else f"{loop.instructions} instr" + ("" if loop.cycles is None else f" {loop.cycles} cycles")
    return (
        *(name, found.target, str(found.registers), str(found.scalar_registers) if amd else "-", str(found.stack)),
        *(str(found.spills + found.scalar_spills), str(found.shared), str(found.num_warps), str(blocks.blocks)),
        *(f"{blocks.fraction:.2f}", " ".join(blocks.limits), *counted, memory, hot),
    )
