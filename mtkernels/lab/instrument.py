"""Connects a Probe to Triton's interpreter (3.8 and 3.9) by replacing methods of its builder and grid executor."""

import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import triton
from torch.utils._python_dispatch import _disable_current_modes

from .launch import PLAIN, Ordering

_NOT_KERNELS = str(Path(__file__).parent), str(Path(triton.__file__).parent)


@contextmanager
def instrumented(probe):
    """Every launch in the block reports to `probe`."""
    from triton.runtime import interpreter as triton_interpreter

    builder = triton_interpreter.InterpreterBuilder
    patches = {**_memory_patches(builder, probe), **_atomic_patches(builder, probe)}
    patches |= {**_pointer_patches(builder, probe), **_dot_patches(builder, probe), **_grid_patches(builder, probe)}
    with mock.patch.multiple(builder, **patches), _launches(triton_interpreter, probe):
        yield


def _handle(data, dtype):
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(data, dtype)


def _item(pointer):
    return max(1, pointer.get_element_ty().primitive_bitwidth // 8)


def _poison(pointer):
    """What lanes without a value hold: NaN, the largest integer or True, for a GPU promises nothing."""
    from triton.runtime.interpreter import _get_np_dtype

    element = pointer.get_element_ty()
    dtype = _get_np_dtype(element)
    if element.is_floating():
        bits = np.full(dtype.itemsize, 0xFF, np.uint8).view(dtype)
        return _handle(np.broadcast_to(bits, pointer.data.shape).copy(), element)
    return _handle(np.full(pointer.data.shape, True if dtype.kind == "b" else np.iinfo(dtype).max, dtype), element)


def _memory_patches(builder, probe):
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store

    def load(self, pointer, mask, other, *rest, **kwargs):
        import triton.language as tl

        volatile = kwargs.get("is_volatile", rest[-1] if rest else False)
        ordering = probe.ordering or (Ordering(atomic=True) if volatile else PLAIN)
        real, allowed = probe.launch.access("load", pointer.data, _item(pointer), mask.data, ordering=ordering)
        # For a scalar, Triton's interpreter gives None also when the kernel says other=0.
        other = _poison(pointer) if other is None and pointer.data.ndim and not allowed.all() else other
        return stock_load(self, _handle(real, pointer.dtype), _handle(allowed, tl.int1), other, *rest, **kwargs)

    def store(self, pointer, value, mask, *rest, **kwargs):
        import triton.language as tl

        values = np.broadcast_to(value.data, pointer.data.shape)
        ordering = probe.ordering or PLAIN
        real, allowed = probe.launch.access("store", pointer.data, _item(pointer), mask.data, values, ordering)
        value = _handle(values, value.dtype)
        return stock_store(self, _handle(real, pointer.dtype), value, _handle(allowed, tl.int1), *rest, **kwargs)

    return {"create_masked_load": load, "create_masked_store": store}


def _ordering_of(semantic, scope):
    """A scope of one program orders nothing between programs, and its atomics are not atomic between them."""
    from triton._C.libtriton import ir

    if scope == ir.MEM_SYNC_SCOPE.CTA:
        return PLAIN
    both = semantic == ir.MEM_SEMANTIC.ACQUIRE_RELEASE
    acquire, release = both or semantic == ir.MEM_SEMANTIC.ACQUIRE, both or semantic == ir.MEM_SEMANTIC.RELEASE
    return Ordering(atomic=True, acquire=acquire, release=release)


def _atomic_patches(builder, probe):
    stock_rmw, stock_cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def rmw(self, op, pointer, value, mask, semantic, scope):
        import triton.language as tl

        ordering = _ordering_of(semantic, scope)
        real, allowed = probe.launch.access("atomic", pointer.data, _item(pointer), mask.data, ordering=ordering)
        return stock_rmw(self, op, _handle(real, pointer.dtype), value, _handle(allowed, tl.int1), semantic, scope)

    def cas(self, pointer, expected, value, semantic, scope):
        item = _item(pointer)
        real, allowed = probe.launch.access("atomic", pointer.data, item, None, ordering=_ordering_of(semantic, scope))
        # There is no mask to keep the interpreter from a stray address.
        scratch = np.zeros(8 * real.size, np.uint8)
        spare = scratch.ctypes.data + 8 * np.arange(real.size, dtype=np.uint64).reshape(real.shape)
        real = np.where(allowed, real, spare)
        return stock_cas(self, _handle(real, pointer.dtype), expected, value, semantic, scope)

    def ordered(name):
        """Triton 3.9's atomic load, store and poll call the plain load and store."""
        stock = getattr(builder, name)

        def access(self, *args):
            probe.ordering = _ordering_of(*args[-2:])
            try:
                return stock(self, *args)
            finally:
                probe.ordering = None

        return access

    names = [n for n in ("create_atomic_load", "create_atomic_store", "create_atomic_poll") if hasattr(builder, n)]
    return {"create_atomic_rmw": rmw, "create_atomic_cas": cas, **{name: ordered(name) for name in names}}


def _pointer_patches(builder, probe):
    stock_to_pointer, stock_to_int = builder.create_int_to_ptr, builder.create_ptr_to_int

    def to_pointer(self, integer, dtype):
        item = max(1, dtype.scalar.element_ty.primitive_bitwidth // 8)
        addresses = stock_to_pointer(self, integer, dtype)
        virtual = [probe.launch.space.map_address(int(a), item, probe.watched) for a in addresses.data.flat]
        return _handle(np.array(virtual, np.uint64).reshape(addresses.data.shape), addresses.dtype)

    def to_int(self, pointer, dtype):
        real = [probe.launch.space.to_real(int(a)) for a in pointer.data.flat]
        return stock_to_int(self, _handle(np.array(real, np.uint64).reshape(pointer.data.shape), pointer.dtype), dtype)

    return {"create_int_to_ptr": to_pointer, "create_ptr_to_int": to_int}


def _to_tf32(data):
    """float32 rounded to 10 mantissa bits, halves away from zero, as cvt.rna.tf32.f32 does."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    finite = (bits & np.uint32(0x7F800000)) != 0x7F800000
    return np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)


def _kernel_function():
    """Name of the jit function that is running: the first frame up that is neither ours nor triton's."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_NOT_KERNELS):
        frame = frame.f_back
    return frame.f_code.co_name


def _dot_patches(builder, probe):
    stock_dot, stock_scaled = builder.create_dot, getattr(builder, "create_dot_scaled", None)

    def count(a_type, b_type, acc, depth):
        flops = 2 * depth * acc.data.size
        probe.launch.dot_flops[f"{a_type} x {b_type} -> {acc.dtype.scalar}"] += flops
        probe.launch.dot_flops_by_function[_kernel_function()] += flops

    def dot(self, a, b, acc, precision, *rest, **kwargs):
        from triton._C.libtriton import ir

        count(a.dtype.scalar, b.dtype.scalar, acc, a.data.shape[-1])
        if a.data.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32:
            a, b = (_handle(_to_tf32(h.data), h.dtype) for h in (a, b))
        return stock_dot(self, a, b, acc, precision, *rest, **kwargs)

    def dot_scaled(self, a, a_scale, a_format, b, b_scale, b_format, fast_math, a_k_pack, *rest):
        from triton._C.libtriton import ir

        packed = a_format == ir.ScaleDotElemTypeTY.E2M1 and a_k_pack
        acc = next(h for h in reversed(rest) if hasattr(h, "data"))
        names = (str(f).rsplit(".", 1)[-1].lower() for f in (a_format, b_format))
        count(*names, acc, a.data.shape[-1] * (2 if packed else 1))
        return stock_scaled(self, a, a_scale, a_format, b, b_scale, b_format, fast_math, a_k_pack, *rest)

    # triton 3.7's interpreter has no dot_scaled
    return {"create_dot": dot, **({"create_dot_scaled": dot_scaled} if stock_scaled else {})}


def _grid_patches(builder, probe):
    stock_dim, stock_idx = builder.set_grid_dim, builder.set_grid_idx

    def set_grid_dim(self, *grid):
        probe.launch.set_grid(grid, probe.seed)
        stock_dim(self, *grid)

    def set_grid_idx(self, *turn):
        stock_idx(self, *probe.launch.start_program(*turn))

    return {"set_grid_dim": set_grid_dim, "set_grid_idx": set_grid_idx}


@contextmanager
def _launches(triton_interpreter, probe):
    executor = triton_interpreter.GridExecutor
    stock_call, stock_arguments = executor.__call__, executor._init_args_hst
    stock_convert = triton_interpreter._implicit_cvt

    def call(self, *args, **kwargs):
        # The interpreter's own torch calls are not the user's.
        with _disable_current_modes(), probe.launching(self.fn.__name__):
            return stock_call(self, *args, **kwargs)

    def arguments(self, args, kwargs):
        args, kwargs = stock_arguments(self, args, kwargs)
        probe.argument_names = dict(_named_tensors((*zip(self.arg_names, args), *kwargs.items())))
        return args, kwargs

    def convert(value):
        converted = stock_convert(value)
        if hasattr(value, "data_ptr") and value.data_ptr():
            name = probe.argument_names.get(id(value), "argument")
            region = probe.launch.space.map_tensor(name, triton_interpreter._unwrap_tensor(value))
            converted.handle.data = np.array([region.begin], np.uint64)
        return converted

    with mock.patch.multiple(executor, __call__=call, _init_args_hst=arguments):
        with mock.patch.object(triton_interpreter, "_implicit_cvt", convert):
            yield


def _named_tensors(pairs):
    for name, value in pairs:
        if isinstance(value, tuple):
            yield from _named_tensors((f"{name}.{i}", v) for i, v in enumerate(value))
        elif hasattr(value, "data_ptr"):
            yield id(value), name
        elif hasattr(value, "base"):
            yield id(value.base), name
