"""A GPU made of numpy: Triton kernels are compiled as ever, and the PTX is executed on CPU tensors.

    with VirtualGPU(arch=80) as gpu:
        op(*cpu_tensors)
    print(gpu.launches[0])

Everything between the Python call and the machine code is the real thing: specialisation on arguments, heuristics,
pipelining, layouts, code generation. What is not: time, caches, and the order in which warps would run.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache

from .driver import TensorMap, compiled_text, parameters, stub_driver
from .ptx import GlobalMemory, Program
from .ptx.async_proxy import encode_descriptor
from .ptx.counters import Counters, instruction_mix, lines, report
from .ptx.memory import LiveStorages

# Translating takes longer than most launches.
_translate = lru_cache(maxsize=512)(Program)


@dataclass
class Launch:
    """One executed launch."""

    kernel: str
    grid: tuple
    num_warps: int
    shared_bytes: int
    program: Program = field(repr=False)
    # basic block -> times a warp ran it
    executed: dict = field(repr=False)
    counters: Counters | None = field(repr=False, default=None)

    @property
    def instructions(self):
        """{class: warp instructions issued}"""
        return instruction_mix(self.program, self.executed)

    def lines(self):
        """Statistics per source line: warp instructions and, when counted, memory accesses."""
        return lines(self.program, self.executed, self.counters)

    def report(self):
        """Table of memory requests per source line; needs VirtualGPU(counters=True)."""
        if self.counters is None:
            raise ValueError("memory requests were not counted; use VirtualGPU(counters=True)")
        return report(self.program, self.executed, self.counters)


class VirtualGPU:
    """Context manager in which Triton launches run on the CPU, as compiled for `arch` (80 or 90).

    counters=True also counts sectors per request and bank conflicts per source line (slower). `edit(name, ptx)` may
    return changed PTX, to try what a different compilation would do. A mistake of the kernel raises `ptx.Finding`.
    """

    def __init__(self, arch=80, *, counters=False, edit=None):
        if arch not in (80, 90):
            raise ValueError(f"arch {arch} cannot be executed; use 80 or 90 (lab.record_launches compiles for others)")
        self.arch, self._count, self._edit = arch, counters, edit
        self.launches, self._programs, self._live = [], {}, LiveStorages()
        self._stack = ExitStack()

    def __enter__(self):
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
            raise RuntimeError(f"the virtual GPU reads launches of triton 3.8 or newer, found {triton.__version__}; record_launches and Probe take this one")
        self._stack.enter_context(stub_driver(self.arch, self._launch))
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def _launch(self, launch):
        metadata = launch["metadata"]
        if getattr(metadata, "num_ctas", 1) > 1:
            raise NotImplementedError(f"{metadata.name}: clusters (num_ctas={metadata.num_ctas}) are not emulated; use num_ctas=1")
        program = self._program(metadata)
        memory = GlobalMemory(self._live)
        arguments = [_argument(memory, name, value) for name, value in parameters(launch["source"], metadata, launch["arguments"])]
        arguments.append(self._scratch(memory, metadata, launch["grid"]))
        counters = Counters() if self._count else None
        options = dict(threads=32 * metadata.num_warps, shared_bytes=metadata.shared, counters=counters)
        done = program.run(launch["grid"], arguments, memory, **options)
        self.launches.append(
            Launch(metadata.name, launch["grid"], metadata.num_warps, metadata.shared, program, done.executed, counters)
        )

    def _scratch(self, memory, metadata, grid):
        """Address of the global scratch that kernels with device-made descriptors get, poisoned."""
        import torch

        size = getattr(metadata, "global_scratch_size", 0) * math.prod(grid)
        scratch = torch.full((size + 128,), 255, dtype=torch.uint8)
        start = -scratch.data_ptr() % 128
        return memory.add("global scratch", scratch.data_ptr() + start, size, scratch) if size else 0

    def _program(self, metadata):
        if metadata.hash not in self._programs:
            ptx = compiled_text(metadata, "ptx")
            self._programs[metadata.hash] = _translate(self._edit(metadata.name, ptx) if self._edit else ptx)
        return self._programs[metadata.hash]


def _argument(memory, name, value):
    if isinstance(value, TensorMap):
        address = memory.add(name, value.address, value.extent)
        return encode_descriptor(address, value.element_size, value.box, value.shape, value.strides, value.swizzle, value.padding)
    if hasattr(value, "data_ptr"):
        base = getattr(value, "base", value)
        if base.device.type != "cpu":
            raise ValueError(f"{name} is on {base.device}; the virtual GPU takes CPU tensors")
        return memory.add(name, value.data_ptr(), _extent(base), value)
    return 0 if value is None else value


def _extent(tensor):
    """Bytes from the first to the last element, whatever lies between rows included."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()
