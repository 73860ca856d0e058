"""Which implementation of a stem runs: the argument, then `with backend(...)`, then MTKERNELS_BACKEND, then automatic.

An explicit choice never falls back; the automatic one takes the first backend of `ORDER[device]` that says yes.
"""

import os
import sys
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch

from . import _native

NAMES = ("reference", "cpu", "triton", "cuda")
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_requested = ""


def _check_name(name):
    if name and name not in NAMES:
        raise ValueError(f"backend {name!r} is not one of {', '.join(NAMES)}; leave it out for the automatic choice")
    return name


def emulating():
    """Triton kernels take CPU tensors: in its interpreter, or inside mtkernels.lab's virtual GPU or launch recorder."""
    driver = sys.modules.get("mtkernels.lab.driver")
    return os.environ.get("TRITON_INTERPRET", "0") == "1" or (driver is not None and driver.active())


def _emulates_cuda(stem):
    """CUDA C++ kernels of `stem` take CPU tensors: inside mtkernels.lab.EmulatedCuda."""
    lab = sys.modules.get("mtkernels.lab.emulated")
    return lab is not None and lab.active() and stem in lab.stems()


@contextmanager
def backend(name):
    """Use backend `name` for every mtkernels op in this block, in every thread of the process.

    name: "reference", "cpu", "triton" or "cuda"; "" goes back to the automatic choice. An op that the backend
    cannot run raises instead of falling back.
    """
    global _requested
    before, _requested = _requested, _check_name(name)
    try:
        yield
    finally:
        _requested = before


def requested(name=None):
    """The backend asked for ("" = automatic): argument, context, environment."""
    if name is not None:
        return _check_name(name)
    return _requested or _ENVIRONMENT


_ENVIRONMENT = os.environ.get("MTKERNELS_BACKEND", "")
if _ENVIRONMENT not in ("", *NAMES):
    raise ValueError(f"MTKERNELS_BACKEND={_ENVIRONMENT!r} is not one of {', '.join(NAMES)}")


def refusal(stem, name, device, dtype):
    """Why backend `name` does not run `stem` on (device, dtype); "" when it does."""
    if name == "reference":
        return ""
    if dtype.is_floating_point and dtype not in KERNEL_DTYPES:
        return f"{dtype} runs on the reference only (kernels take float32, bfloat16, float16)"
    if name == "triton":
        return _triton_refusal(stem, device)
    if name == "cuda" and device == "cpu" and _emulates_cuda(stem):
        return ""
    if device != name:
        return f"takes {name} tensors, got {device}"
    if not _native.available():
        return _native.reason()
    if not _native.has_stem(stem, device):
        return f"the extension has no {device} kernel for {stem}"
    return ""


def _triton_refusal(stem, device):
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device == "cpu" and not emulating():
        return "takes cuda tensors; CPU tensors only under TRITON_INTERPRET=1 or in mtkernels.lab.VirtualGPU"
    if device not in ("cpu", "cuda"):
        return f"takes cuda tensors, got {device}"
    if find_spec(f"mtkernels.triton_kernels.{stem}") is None:
        return f"no Triton kernel for {stem}"
    return ""


def choose(stem, name, device, dtype):
    """The backend that runs `stem`; raises by name when an explicit choice cannot."""
    on_cpu = device == "cpu"
    emulated = (name == "triton" and on_cpu and emulating()) or (name == "cuda" and on_cpu and _emulates_cuda(stem))
    return _choose(stem, name, device, dtype, emulated)


@lru_cache(maxsize=None)
def _choose(stem, name, device, dtype, _emulating):
    if name:
        why = refusal(stem, name, device, dtype)
        if why:
            raise RuntimeError(f"backend {name!r} cannot run {stem} here: {why}")
        return name
    for candidate in ORDER.get(device, ("reference",)):
        if not refusal(stem, candidate, device, dtype):
            if candidate == "reference" and (not dtype.is_floating_point or dtype in KERNEL_DTYPES):
                _warn_reference(stem, device, dtype)
            return candidate
    raise AssertionError("the reference takes everything")


def _warn_reference(stem, device, dtype):
    if device == "cpu":
        _native.warn_missing_once()
    else:
        import warnings

        reasons = "; ".join(f"{n}: {refusal(stem, n, device, dtype)}" for n in ORDER.get(device, ()) if n != "reference")
        warnings.warn(f"mtkernels: {stem} on {device} runs the slow reference ({reasons or 'no kernels for this device'})", stacklevel=4)


@lru_cache(maxsize=None)
def _namespace(stem, name):
    if name == "reference":
        return import_module(f"mtkernels.reference.{stem}")
    if name == "triton":
        return import_module(f"mtkernels.triton_kernels.{stem}")
    return _native.ops()


def launchers(stem, tensor, name):
    """The namespace that holds `stem`'s launchers for this tensor."""
    chosen = choose(stem, name, tensor.device.type, tensor.dtype)
    if chosen == "cuda" and tensor.device.type == "cpu":
        return sys.modules["mtkernels.lab.emulated"].launchers(stem)
    return _namespace(stem, chosen)


def or_automatic(stem, name, tensor):
    """The backend asked for if it runs `stem` on this tensor, else "": for what an op needs beside its own kernels."""
    name = requested(name)
    return "" if name and refusal(stem, name, tensor.device.type, tensor.dtype) else name


class Explanation(dict):
    """Backend name -> "yes" or the reason it does not run; `.chosen` is the one that does."""

    def __init__(self, op, chosen, rows):
        super().__init__(rows)
        self.op, self.chosen = op, chosen

    def __str__(self):
        lines = [f"{self.op}: {self.chosen or 'nothing'} runs"]
        return "\n".join(lines + [f"  {name:<10} {why}" for name, why in self.items()])


def explain(op, *args, backend=None, **kwargs):
    """Each backend of `op` for these arguments: "yes", or the reason it is not used.

    op: public name ("lora_linear") or stem; args: what you would call it with (the first floating-point tensor, or
    else the first tensor, decides device and dtype; none: CPU float32). Returns a dict that prints as a table.
    """
    from .ops import stem_of

    stem, name = stem_of(op), requested(backend)
    tensors = [t for t in _tensors((args, kwargs))]
    lead = next((t for t in tensors if t.is_floating_point()), tensors[0] if tensors else torch.empty(0))
    dtype = next((t.dtype for t in tensors if t.dtype == torch.float64), lead.dtype)
    rows = {n: refusal(stem, n, lead.device.type, dtype) or "yes" for n in NAMES}
    chosen = name if name and rows[name] == "yes" else ""
    if not name:
        chosen = next(n for n in ORDER.get(lead.device.type, ("reference",)) if rows[n] == "yes")
    return Explanation(op, chosen, rows)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "tensors"):
        yield from _tensors(tuple(value.tensors()))
