"""Counts what eager torch would launch on a GPU: every operation of the block, with its bytes and FLOPs.

    with TorchOps() as seen:
        torch.nn.functional.linear(x, w).relu_()
    seen.launches       # [Launch("aten::mm", "vendor GEMM", ...), Launch("aten::relu_", "torch", ...)]

One launch an operation that computes or copies; views, allocations and reads of a scalar are none. Each operand is read
once and each result written once, by the elements a tensor holds (an expanded one holds fewer than it shows); operations
that gather or scatter rows move those rows. Sorts, scans, nonzero and reductions are several launches on a GPU and are
counted as one, so counts are lower bounds. FLOPs are those of matrix products, by torch.utils.flop_counter.
"""

import sys
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .storages import UNDEFINED, call_seen_by

GEMM, TORCH, TRITON = "vendor GEMM", "torch", "triton"
_GEMMS = frozenset(("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm"))
_NO_LAUNCH = ("_unsafe_view", "detach_", "lift_fresh", "lift_fresh_copy", "_local_scalar_dense", "set_", "resize_", "resize_as_", "record_stream")
_FREE = UNDEFINED | {f"aten::{name}" for name in _NO_LAUNCH}
# Operations that take only some rows of their first operand, as many as they give.
_GATHERS = frozenset(("index", "index_select", "gather", "embedding", "take", "take_along_dim"))
# Scatters into their first operand: name -> position of the values.
_SCATTERS = {"index_add": 3, "index_put": 2, "_index_put_impl": 2, "index_copy": 3, "scatter": 3, "scatter_add": 3}
_OVERWRITES = frozenset(("copy", "fill", "zero", "bernoulli", "uniform", "normal", "random"))


@dataclass
class Launch:
    """One launch: bytes of the different memory it touches, bytes it asks for, matrix FLOPs by element type.

    functions: matrix FLOPs by the jit function that issues them, in a Triton kernel.
    """

    name: str
    kind: str
    distinct_bytes: int
    requested_bytes: int
    flops: dict = field(default_factory=dict)
    functions: dict = field(default_factory=dict)


def held_bytes(tensor):
    """Bytes of the elements a tensor holds: repeats of an expanded dimension are one."""
    n = tensor.element_size() if tensor.numel() else 0
    for size, stride in zip(tensor.shape, tensor.stride()):
        n *= size if stride else 1
    return n


class TorchOps(TorchDispatchMode):
    """Dispatch mode; `launches` grows in the order of the calls."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __enter__(self):
        # On the CPU dropout is three operations, on a GPU one.
        self._patch = mock.patch.object(torch.nn.functional, "dropout", _fused_dropout(torch.nn.functional.dropout))
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # below autograd, linear and matmul arrive whole
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = call_seen_by(self, func, args, kwargs)
        if func.namespace == "aten" and not func.is_view and func._schema.name not in _FREE and not _in_a_check():
            self.launches += _launches(func, args, kwargs, out)
        return out


def _fused_dropout(stock):
    def dropout(input, p=0.5, training=True, inplace=False):
        if inplace or not training or p == 0:
            return stock(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    return dropout


def _in_a_check():
    """Called by an argument check of this package: those that read values run for CPU tensors only."""
    frame = sys._getframe(2)
    while frame:
        if frame.f_code.co_name.startswith("_check") and frame.f_globals.get("__name__", "").startswith("mtkernels.ops."):
            return True
        frame = frame.f_back
    return False


def _tensors(values):
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def _launches(func, args, kwargs, out):
    name = func._schema.name.split("::")[1]
    base, results = name.rstrip("_"), _tensors(out)
    if not any(t.numel() for t in results):
        return
    if base in _SCATTERS:
        yield from _scatter(name, base, args, kwargs)
        return
    n_bytes = sum(_traffic(base, _tensors((args, kwargs)), results))
    yield Launch(f"aten::{name}", GEMM if base in _GEMMS else TORCH, n_bytes, n_bytes, _flops(func, base, args, kwargs, out))


def _scatter(name, base, args, kwargs):
    """A form that is not in place copies its destination first; in a backward pass that is the dispatch mode's doing."""
    target, values = args[0], args[_SCATTERS[base]]
    if name == base and torch._C._current_graph_task_id() < 0:
        yield Launch(f"aten::{name} (copy)", TORCH, 2 * held_bytes(target), 2 * held_bytes(target))
    reached = min(held_bytes(values), held_bytes(target)) if isinstance(values, torch.Tensor) and values.numel() > 1 else held_bytes(target)
    adds = base in ("index_add", "scatter_add") or (len(args) > 3 and args[3] is True)
    n_bytes = reached * (1 + adds) + sum(held_bytes(t) for t in _tensors((args[1:], kwargs)))
    yield Launch(f"aten::{name}", TORCH, n_bytes, n_bytes)


def _traffic(base, inputs, results):
    """(bytes read, bytes written)"""
    written = sum(map(held_bytes, results))
    if base in _GATHERS:
        return sum(map(held_bytes, inputs[1:])) + written, written
    if base == "nll_loss_forward":  # one log-probability a row
        return sum(map(held_bytes, inputs[1:])) + inputs[0].element_size() * inputs[1].numel(), written
    if base == "nll_loss_backward":  # of the log-probabilities only the shape counts
        return sum(map(held_bytes, (inputs[0], *inputs[2:]))), written
    if base in _OVERWRITES:
        inputs = inputs[1:]
    return sum({t.data_ptr(): held_bytes(t) for t in inputs}.values()), written


def _flops(func, base, args, kwargs, out):
    if base not in _GEMMS:
        return {}
    a, b = [t for t in _tensors(args) if t.dim() > 1][-2:]
    count = flop_registry.get(func._overloadpacket)
    if count is not None:
        n = int(count(*args, **kwargs, out_val=out))
    else:  # grouped [G,] M x K with [G,] K x N: an element of the operand that has the rows of every group meets one group
        n = 2 * (b.numel() * a.shape[-2] if a.dim() > b.dim() else a.numel() * b.shape[-1])
    return {str(b.dtype).removeprefix("torch."): n}
