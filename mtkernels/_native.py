"""Loads the compiled kernels, torch.ops.mtkernels_C, or keeps the reason why it could not."""

import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

COMMAND = "pip install --no-build-isolation ."


@lru_cache(maxsize=None)
def reason():
    """Why the compiled kernels are missing and what to do; "" when they are loaded."""
    spec = find_spec("mtkernels._C")
    if spec is None:
        return f"no compiled kernels in this install; in a checkout or sdist, with torch installed, run: {COMMAND}"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"{Path(spec.origin).name} does not load with torch {torch.__version__} ({error}); rebuild it: {COMMAND}"
    return ""


def available():
    return not reason()


def ops():
    """The namespace of raw kernels; raises with the reason when it is missing."""
    if not available():
        raise RuntimeError(f"mtkernels: {reason()}")
    return torch.ops.mtkernels_C


def has_op(name, device="cpu"):
    """Whether raw kernel `name` exists for "cpu" or "cuda" tensors."""
    if not available() or device not in ("cpu", "cuda"):
        return False
    op = f"mtkernels_C::{name}"
    return torch._C._dispatch_has_kernel(op) and torch._C._dispatch_has_kernel_for_dispatch_key(op, device.upper())


def has_stem(stem, device="cpu"):
    """Whether op `stem` has raw kernels for "cpu" or "cuda" tensors."""
    return has_op(stem, device) or has_op(f"{stem}_fwd", device)


def cuda_built():
    """Whether the extension was built with its CUDA kernels (true or false without a GPU)."""
    return has_stem("task_reduce", "cuda")


@lru_cache(maxsize=None)
def fast_matmul(dtype):
    """Whether torch multiplies float32, bfloat16 or float16 matrices at this CPU's full speed. Asks the compiled kernels."""
    if dtype == torch.float32:
        return not torch.backends.mkl.is_available() or ops().cpu_has_fast_mkl()
    return dtype in (torch.bfloat16, torch.float16) and ops().cpu_has_fast_16bit(dtype == torch.float16)


@lru_cache(maxsize=None)
def warn_missing_once():
    """Tell the user, once, that CPU tensors run on the slow reference."""
    if not available():
        warnings.warn(f"mtkernels: CPU tensors run on the slow reference: {reason()}", stacklevel=4)
