"""Which Triton kernels an unmodified Python call launches, and what each was compiled to.

    with record_launches(arch=90) as launches:
        op(*cpu_tensors)
    for launch in launches:
        print(launch)

The call runs on CPU tensors; kernels are specialised and compiled as for the real GPU, and nothing is executed: outputs
hold what torch.empty left there. Code whose launches depend on what a kernel computed needs the virtual GPU instead.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

from .driver import compiled_text, stub_driver


@dataclass(frozen=True)
class RecordedLaunch:
    kernel: str
    grid: tuple
    num_warps: int
    num_stages: int | None
    shared_bytes: int
    # arguments by name, as the kernel was specialised on them: "i32", "*bf16", or the value of a constexpr
    signature: dict
    constants: dict
    metadata: object = field(repr=False)

    @property
    def programs(self):
        x, y, z = self.grid
        return x * y * z

    def asm(self, kind):
        """Compiled text at one stage: "ttir", "ttgir", "llir", and "ptx" or "amdgcn"."""
        return compiled_text(self.metadata, kind)


@contextmanager
def record_launches(arch=90):
    """List of the launches made in the block, compiled for `arch` (80, 86, 89, 90, 100, 103, 120 or "gfx942", ...)."""
    launches = []
    with stub_driver(arch, lambda launch: launches.append(_recorded(**launch))):
        yield launches


def _recorded(source, metadata, grid, arguments):
    names = source.fn.arg_names
    return RecordedLaunch(
        kernel=metadata.name,
        grid=tuple(grid),
        num_warps=metadata.num_warps,
        num_stages=getattr(metadata, "num_stages", None),
        shared_bytes=metadata.shared,
        signature=dict(source.signature),
        constants={names[path[0]] if isinstance(path, tuple) else path: v for path, v in source.constants.items()},
        metadata=metadata,
    )


def summary(launches):
    """{kernel: number of launches}, in order of first launch."""
    counts = {}
    for launch in launches:
        counts[launch.kernel] = counts.get(launch.kernel, 0) + 1
    return counts
