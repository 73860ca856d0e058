"""Which memory of CPU tensors is live, and which of its bytes nothing has written yet."""

import gc
import mmap

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

UNDEFINED = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
)
_TORCH_NAMESPACES = frozenset(("aten", "prim", "prims", "profiler"))
_KERNEL_KEYS = ("CPU", "CompositeExplicitAutograd")
_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)
_MAP_NORESERVE = 0x4000
_LARGE = 1 << 28


def lazy_zeros(n, dtype):
    """Zeros that cost memory only where they are touched, even when there are more than the machine could hold."""
    dtype = np.dtype(dtype)
    if n * dtype.itemsize < _LARGE:
        return np.zeros(n, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, n * dtype.itemsize, flags=flags), dtype, n)


def call_seen_by(mode, func, args, kwargs):
    """Run an operation that `mode` was given; what a custom one does in Python goes to the mode too, what it does in C++ does not."""
    if func.namespace not in _TORCH_NAMESPACES:
        schema = func._schema
        name = ".".join(filter(None, (schema.name.replace("::", "/"), schema.overload_name)))
        for key in _KERNEL_KEYS:
            if f"{name}/{key}" in torch.library._impls:
                with mode:
                    return func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)
    return func(*args, **kwargs)


class Storage:
    """The memory of one torch storage; `written` marks each byte, and is None when all bytes are defined."""

    __slots__ = ("ref", "begin", "nbytes", "written", "label")

    def __init__(self, storage, defined, label=""):
        self.ref = StorageWeakRef(storage)
        self.begin, self.nbytes, self.label = storage.data_ptr(), storage.nbytes(), label
        # Padded, so that it can be viewed at the width of any element.
        self.written = None if defined else lazy_zeros(self.nbytes // 16 * 16 + 16, np.uint8)

    @property
    def alive(self):
        return not self.ref.expired()

    def mark_written(self, tensor):
        if self.written is None:
            return
        item = tensor.element_size()
        strides = (*(s * item for s in tensor.stride()), 1)
        flags = torch.from_numpy(self.written)
        torch.as_strided(flags, (*tensor.shape, item), strides, tensor.storage_offset() * item).fill_(1)


class StorageTracker(TorchDispatchMode):
    """Sees every torch operation of the block; `find` and `of` give the storage of an address or a tensor."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.prune_at = 1024

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            self._see(value, defined=True)
        out = call_seen_by(self, func, args, kwargs)
        self._mark_arguments(func, args, kwargs)
        self._see(out, defined=func._schema.name not in UNDEFINED)
        return out

    def _mark_arguments(self, func, args, kwargs):
        schema = func._schema
        if not schema.is_mutable:
            return
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    storage = self.of(tensor)
                    if storage is not None:
                        storage.mark_written(tensor)

    def _see(self, value, defined):
        if isinstance(value, torch.Tensor):
            self.of(value, defined)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._see(item, defined)

    def of(self, tensor, defined=True):
        """Storage of a CPU tensor, noted as live, or None when the tensor has no memory of its own."""
        if type(tensor) not in _TENSOR_TYPES or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return None
        try:
            begin = tensor.untyped_storage().data_ptr()
        except RuntimeError:  # functorch and functionalization wrappers
            return None
        return self.note(tensor, defined) if begin else None

    def note(self, tensor, defined=True):
        """Its storage; `defined` says whether a storage seen for the first time holds values."""
        storage = tensor.untyped_storage()
        begin = storage.data_ptr()
        known = self.storages.get(begin)
        if known is None or known.ref.cdata != storage._cdata or not known.alive or known.nbytes != storage.nbytes():
            label = f"{str(tensor.dtype).removeprefix('torch.')} tensor {tuple(tensor.shape)}"
            known = self.storages[begin] = Storage(storage, defined, label)
            self._prune()
        return known

    def find(self, address):
        """Live storage that holds an address, or None."""
        exact = self.storages.get(address)
        if exact is not None and exact.alive:
            return exact
        inside = (s for s in self.storages.values() if s.begin <= address < s.begin + s.nbytes and s.alive)
        return next(inside, None)

    def collect(self):
        """Note every tensor that Python holds: those made before the block and never seen in it."""
        for candidate in gc.get_objects():
            if type(candidate) in _TENSOR_TYPES:
                self.of(candidate)

    def _prune(self):
        if len(self.storages) > self.prune_at:
            self.storages = {begin: s for begin, s in self.storages.items() if s.alive}
            self.prune_at = 2 * len(self.storages) + 1024
