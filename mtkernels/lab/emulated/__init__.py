"""The package's CUDA C++ kernels on CPU tensors: inside the block, backend="cuda" runs csrc/cuda/X.cu in CudaEmulator.

    with EmulatedCuda(seed=3):
        task_reduce(values, task_ids, 8, backend="cuda")

A module X.py here holds the launchers of X.cu, with the outputs and launch parameters of X_op.cpp. Every launch runs in
another random order of threads and blocks; a mistake of the kernel raises KernelMistake.
"""

import re
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from .. import _cuda_build
from ..cuda_emulator import CudaEmulator, KernelMistake, unwritten

_ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)  # csrc/common/element.h
_active = None


class EmulatedCuda:
    """Context manager; not reentrant.

    seed: of the order of threads and blocks, another one for each launch. tools: those of CudaEmulator.findings that look
    at a copy of every launch first. `launches` lists the entries called.
    """

    def __init__(self, seed=0, tools=()):
        self.seed, self.tools, self.launches = seed, tuple(tools), []

    def __enter__(self):
        global _active
        if why := refusal():
            raise RuntimeError(why)
        if _active is not None:
            raise RuntimeError("an EmulatedCuda block is open already")
        _active = self
        return self

    def __exit__(self, *exception):
        global _active
        _active = None

    def launch(self, stem, entry, args):
        emulator, arrays = _emulator(stem), [_as_array(a) for a in args]
        seed = self.seed + len(self.launches)
        self.launches.append(entry)
        if self.tools:
            found = emulator.findings(entry, *arrays, tools=self.tools, seeds=(seed, seed + 1, seed + 2))
            if found:
                raise KernelMistake(found)
        emulator.run(entry, *arrays, seed=seed, resident=1 + seed % 4)


def active():
    return _active is not None


def stems():
    """The ops whose .cu file can run here."""
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py")))


def launchers(stem):
    """Module with the launchers of csrc/cuda/<stem>.cu."""
    return import_module(f"{__name__}.{stem}")


@lru_cache(maxsize=None)
def refusal():
    """Why nothing can be emulated on this machine; "" if it can."""
    if find_spec("pybind11") is None:
        return "lab.CudaEmulator needs pybind11: pip install pybind11"
    try:
        _cuda_build.compiler(), _cuda_build.cuda_headers()
    except RuntimeError as missing:
        return str(missing)
    return ""


# For the launchers


def launch(stem, function, *args):
    """Call mtk::cuda::launch_<function> of <stem>.cu with tensors, None and numbers."""
    _active.launch(stem, f"mtk::cuda::launch_{function}", args)


def element(tensor):
    """The Element of a tensor, as a kernel takes it."""
    return _ELEMENTS.index(tensor.dtype)


def output(shape, dtype):
    """A tensor whose every element the kernel must write: NaN or -1, and "trace" reports what stays."""
    size = torch.empty(0, dtype=dtype).element_size()
    array = unwritten(shape, f"u{size}")
    tensor = torch.from_numpy(array.view(np.ndarray)).view(dtype)
    tensor.unwritten = array
    return tensor


def scratch(shape, dtype):
    """A tensor for a kernel's own use, filled as `output` is."""
    return torch.full((*shape, torch.empty(0, dtype=dtype).element_size()), 255, dtype=torch.uint8).view(dtype).squeeze(-1)


@lru_cache(maxsize=None)
def _emulator(stem):
    source = _cuda_build.csrc() / "cuda" / f"{stem}.cu"
    entries = re.findall(r"^const char\* (launch_\w+)\(", source.read_text(), re.M)
    return CudaEmulator(source, entries=[f"mtk::cuda::{name}" for name in entries])


def _as_array(value):
    if not isinstance(value, torch.Tensor):
        return value
    raw = value.detach().view(torch.int16) if value.dtype == torch.bfloat16 else value.detach()
    array = raw.numpy()
    fresh = getattr(value, "unwritten", None)
    return array if fresh is None else fresh.view(array.dtype)
