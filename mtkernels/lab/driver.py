"""A stand-in for Triton's GPU driver: the ordinary JIT specialises and compiles for a GPU that is not there.

Launches go to whoever activated it: the recorder, or the virtual GPU.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .interpreter import interpreting

# Multiprocessors, opt-in shared memory and registers as the kernels' own host code may ask for them.
_PROPERTIES = {
    80: (108, 163 * 1024),
    86: (84, 99 * 1024),
    89: (142, 99 * 1024),
    90: (132, 227 * 1024),
    100: (148, 227 * 1024),
    103: (148, 227 * 1024),
    120: (170, 99 * 1024),
}
# JIT caches are kept per device number; ours must not meet those of real devices.
_FIRST_DEVICE = 1000


@contextmanager
def stub_driver(arch, on_launch):
    """Compile for `arch` (80, 90, ... or "gfx942") and call on_launch(launch: dict) instead of launching."""
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into Python; unset it before importing triton to compile them")
    if isinstance(arch, int) and arch not in _PROPERTIES:
        raise ValueError(f"arch {arch} is not known; use one of {', '.join(map(str, _PROPERTIES))} or an AMD name such as 'gfx942'")
    from triton import knobs
    from triton.runtime.driver import driver

    before = driver._active
    stub = _make_stub(arch, on_launch)
    driver.set_active(stub)
    knobs.runtime.kernel_load_start_hook.add(_remember_files)
    try:
        yield stub
    finally:
        knobs.runtime.kernel_load_start_hook.remove(_remember_files)
        driver._active = before


def active():
    """Triton compiles for a GPU that is not there, so its kernels take CPU tensors in this block."""
    from triton.runtime.driver import driver

    return hasattr(driver._active, "on_launch")


def arch():
    """What Triton compiles for in this block: 80, 90, ... or "gfx942"; None outside."""
    from triton.runtime.driver import driver

    return driver._active.utils.arch if active() else None


# Compiled files of each kernel by hash: Triton shows them to the driver only through this hook.
_files = {}


def _remember_files(module, function, name, metadata_group, hash):
    _files[hash] = {Path(p).suffix[1:]: Path(p) for p in metadata_group.values()}


def compiled_text(metadata, kind):
    """A compilation stage ("ptx", "ttgir", ...) of a launched kernel."""
    return _files[metadata.hash][kind].read_text()


@dataclass(frozen=True)
class TensorMap:
    """What a host-made TMA descriptor holds: address, sizes and strides in elements, outermost dimension first."""

    address: int
    swizzle: int
    element_size: int
    element_type: int
    box: tuple
    shape: tuple
    strides: tuple
    padding: int

    @property
    def extent(self):
        """Bytes from the first to the last element."""
        return (sum((n - 1) * step for n, step in zip(self.shape, self.strides)) + 1) * self.element_size


class _Utils:
    """What Triton asks of its compiled driver module."""

    fill_tma_descriptor_tiled = TensorMap

    def __init__(self, arch, warp_size):
        self.arch, self.warp_size = arch, warp_size

    def get_device_properties(self, device):
        multiprocessors, shared = _PROPERTIES.get(self.arch, (304, 64 * 1024))
        properties = dict(max_shared_mem=shared, multiprocessor_count=multiprocessors, max_num_regs=65536, warpSize=self.warp_size)
        return properties | dict(sm_clock_rate=0, mem_clock_rate=0, mem_bus_width=0)

    def load_binary(self, name, binary, shared, device):
        # No module: kernels would unload it when collected, through a driver that is gone by then.
        return None, object(), 0, 0, 1024


def _make_stub(arch, on_launch):
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    nvidia = isinstance(arch, int)
    target = GPUTarget("cuda", arch, 32) if nvidia else GPUTarget("hip", arch, 64)

    class Stub(DriverBase):
        def __init__(self):
            self.utils, self.on_launch = _Utils(arch, target.warp_size), on_launch

        def launcher_cls(self, source, metadata):
            return _Launcher(source, metadata)

        def get_current_target(self):
            return target

        def get_current_device(self):
            return _FIRST_DEVICE + (arch if nvidia else int(arch.removeprefix("gfx"), 16))

        def get_current_stream(self, device=None):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_device_interface(self):
            return torch.cpu

        def map_python_to_cpp_type(self, ty):
            return ty

        def is_active(self):
            return True

        def get_benchmarker(self):
            # Nothing can be timed: every configuration runs once and takes equally long.
            return lambda function, quantiles=None, **_: (function(), [1.0] * len(quantiles or (0.5,)))[1]

        def get_empty_cache_for_benchmark(self):
            return torch.empty(0)

        def clear_cache(self, cache):
            """There is no cache."""

    return Stub()


class _Launcher:
    """Called by Triton with the arguments of every launch; finds the driver active at that time."""

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments):
        from triton.runtime.driver import driver

        driver.active.on_launch(dict(source=self.source, metadata=self.metadata, grid=(x, y, z), arguments=arguments))


def parameters(source, metadata, arguments):
    """(name, value) of each kernel parameter: constexprs dropped, tuples and descriptors taken apart."""
    from triton.backends.driver import expand_signature, wrap_handle_tensordesc_impl
    from triton.backends.nvidia.driver import make_tensordesc_arg

    described = getattr(metadata, "tensordesc_meta", None)
    signature = dict(source.signature)
    expanded = []
    wrap_handle_tensordesc_impl(lambda *a: expanded.extend(a[-1]), signature, described, make_tensordesc_arg)(arguments)
    types, names = expand_signature(signature.values(), described, "nvTmaDesc"), []
    for name, kind in signature.items():
        names += [name] * len(expand_signature([kind], described, "nvTmaDesc"))
    return list(_flatten(names, types, expanded))


def _flatten(names, types, values):
    for name, kind, value in zip(names, types, values):
        if isinstance(kind, tuple):
            yield from _flatten([name] * len(kind), kind, value)
        elif kind != "constexpr":
            yield name, value
