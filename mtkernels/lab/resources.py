"""Compile the shipped Triton kernels for GPUs that are not there, and read what each would use of them.

    for case in shipped_cases("sm_90"):
        print(case.name, measure(case, "sm_90"))

Every triton_kernels/X.py lists what it ships in `compile_cases(arch)`. Nothing is executed, so nothing here is a time.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from .interpreter import interpreting

# Opt-in shared memory per block, in bytes.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_120": 99 * 1024,
}
TENSOR_CORE_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")
_SPILLS = ("LDL", "STL")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: bytes for stack and shared memory, static counts of SASS instructions."""

    registers: int
    stack: int
    spills: int
    shared: int
    num_warps: int
    instructions: int
    tensor_cores: dict


def shipped_cases(target, stems=None):
    """Every compile case of the kernel modules (or of `stems`), configured for `target`, e.g. "sm_90"."""
    _check_target(target)
    common = import_module("mtkernels.triton_kernels._common")
    stems = stems or sorted(p.stem for p in Path(common.__file__).parent.glob("*.py") if not p.stem.startswith("_"))
    for stem in stems:
        module = import_module(f"mtkernels.triton_kernels.{stem}")
        if hasattr(module, "compile_cases"):
            yield from module.compile_cases(common.config_arch(target))


def measure(case, target, aligned=True):
    """Resources of `case` on `target`. aligned=False compiles for odd sizes and unaligned pointers."""
    _check_target(target)
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into Python; unset it before importing triton to compile them")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    divisible = case.aligned if aligned else ()
    paths = [path for i, (a, t) in enumerate(case.signature.items()) if a in divisible for path in _paths(i, t)]
    attrs = {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constexprs, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=case.options)
    usage, sass = _disassemble(compiled.asm["cubin"])
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE))
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=sum(opcodes[op] for op in _SPILLS),
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        instructions=sum(opcodes.values()),
        tensor_cores={op: opcodes[op] for op in TENSOR_CORE_INSTRUCTIONS if opcodes[op]},
    )


def problems(case, resources, target):
    """What would make the kernel slow or unlaunchable on `target`, in words; empty when nothing does."""
    found = []
    if resources.stack or resources.spills:
        found.append(f"{resources.stack} bytes of stack, {resources.spills} spill instructions")
    if resources.shared > SHARED_MEMORY[target]:
        found.append(f"{resources.shared} bytes of shared memory, {target} has {SHARED_MEMORY[target]}")
    if case.tensor_cores and not resources.tensor_cores:
        found.append("no tensor-core instruction")
    return found


def _paths(i, kind):
    """Where ASTSource finds argument i, or each member of a tuple."""
    return [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]


def _check_target(target):
    if target not in SHARED_MEMORY:
        raise ValueError(f"target {target!r} is not known; use one of {', '.join(SHARED_MEMORY)}")


def _disassemble(cubin):
    """({REG, STACK, ...: number}, SASS text) from the binary utilities that come with triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "cuobjdump").exists():
        raise RuntimeError(f"cuobjdump is not in {tools}; install a triton wheel with the NVIDIA backend")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}, sass
