"""Run, check and measure Triton and CUDA kernels on a machine without a GPU.

VirtualGPU executes the PTX that Triton compiles; Probe instruments Triton's interpreter; CudaEmulator runs .cu files under
sanitizers, and EmulatedCuda the package's own; record_launches lists what a call would launch; resources cross-compiles. Names load on first use.
"""

from importlib import import_module

_HOMES = {
    "CudaEmulator": "cuda_emulator",
    "EmulatedCuda": "emulated",
    "Probe": "probe",
    "VirtualGPU": "virtual_gpu",
    "record_launches": "recorder",
    "summary": "recorder",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
