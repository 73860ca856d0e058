"""Repair the 16-bit and 8-bit floats of Triton's CPU interpreter.

The stock interpreter keeps bf16 and fp8 as bit patterns: casts to them truncate, and arithmetic, comparisons and dot
work on the patterns themselves. `install()` makes casts round to nearest even (fp8 saturating, as `cvt.rn.satfinite`)
and computes on the values: elementwise in float32 with one rounding, dot with float32 accumulation, atomic add of bf16.

    install()            # for the process; again is a no-op
    with repaired(): ... # or for a block
"""

import os
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch

_originals = {}


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def install():
    """Patch the interpreter. Does nothing outside TRITON_INTERPRET=1 or when already installed."""
    if _originals or not interpreting():
        return
    from triton.runtime import interpreter as stock

    builder = stock.InterpreterBuilder
    for name, patch in {**_cast_patches(builder), **_arithmetic_patches(builder)}.items():
        _originals[builder, name] = vars(builder).get(name)
        setattr(builder, name, patch)
    _originals[stock, "_patch_lang"] = stock._patch_lang
    stock._patch_lang = _patch_lang_once(stock._patch_lang)


def uninstall():
    """Put the stock interpreter back."""
    if not _originals:
        return
    for (owner, name), stock in _originals.items():
        if stock is None:
            delattr(owner, name)
        else:
            setattr(owner, name, stock)
    _originals.clear()


@contextmanager
def repaired():
    """The repaired interpreter inside the block; an enclosing install() stays."""
    before = bool(_originals)
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def _patch_lang_once(stock):
    """Patch the language once a launch: the stock interpreter does it again, in vain, at every call of a jit helper."""
    import triton.language as tl

    patched = set()

    def patch_lang(fn):
        modules = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules in patched:
            return SimpleNamespace(restore=lambda: None)
        patched.add(modules)
        scope = stock(fn)
        restore = scope.restore

        def restore_and_forget():
            patched.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    return patch_lang


@cache
def _formats():
    """Name of a Triton dtype -> (torch dtype, numpy and torch dtypes of its patterns, largest value or None)."""
    return {
        "bf16": (torch.bfloat16, np.uint16, torch.uint16, None),
        "fp8e4nv": (torch.float8_e4m3fn, np.uint8, torch.uint8, 448.0),
        "fp8e5": (torch.float8_e5m2, np.uint8, torch.uint8, 57344.0),
    }


def _values(bits, fmt):
    """float32 values of bit patterns."""
    dtype, np_bits, torch_bits, _ = fmt
    bits = np.ascontiguousarray(bits, np_bits)
    return torch.from_numpy(bits.copy()).view(torch_bits).view(dtype).float().numpy().reshape(bits.shape)


def _patterns(values, fmt):
    """Bit patterns of float32 values, rounded to nearest even."""
    dtype, _, torch_bits, largest = fmt
    values = np.array(values, np.float32, order="C")
    if largest is not None:
        values = np.where(np.isnan(values), values, np.clip(values, -largest, largest))
    return torch.from_numpy(values).to(dtype).view(torch_bits).numpy().reshape(values.shape)


def _widen(handle):
    """Values of a handle: float32 for the formats kept as bit patterns, its own data otherwise."""
    fmt = _formats().get(handle.dtype.scalar.name)
    return handle.data if fmt is None else _values(handle.data, fmt)


def _narrow(values, dtype):
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    fmt = _formats().get(dtype.name)
    return TensorHandle(values.astype(_get_np_dtype(dtype)) if fmt is None else _patterns(values, fmt), dtype)


def _cast_patches(builder):
    import triton.language as tl

    formats, stock_cast, stock_fp_to_fp = _formats(), builder.cast_impl, builder.create_fp_to_fp

    def cast(self, src, dst_type, *rest, **kwargs):
        src_dtype, dst = src.dtype.scalar, dst_type.scalar
        if src_dtype == dst or not (src_dtype.name in formats or dst.name in formats):
            return stock_cast(self, src, dst_type, *rest, **kwargs)
        return _narrow(_widen(src), dst)

    def fp_to_fp(self, src, dst_type, *rest, **kwargs):
        if src.dtype.scalar.name in formats or dst_type.scalar.name in formats:
            return cast(self, src, dst_type)
        return stock_fp_to_fp(self, src, dst_type, *rest, **kwargs)

    def bf16(self, value):
        return _narrow(np.array([value], np.float32), tl.bfloat16)

    return {"cast_impl": cast, "create_fp_to_fp": fp_to_fp, "get_bf16": bf16}


def _lift(original):
    """The elementwise builder method `original`, computing on values where operands are bit patterns."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    formats = _formats()

    def op(self, *args):
        *handles, fn = args
        # np.where moves patterns unchanged; a GPU does not warn about inf and NaN.
        with np.errstate(all="ignore"):
            dtype = next((h.dtype.scalar for h in handles if h.dtype.scalar.name in formats), None)
            if dtype is None or fn is np.where:
                result = original(self, *args)
                # Stock comparisons keep the operand's dtype, which a later splat to a mask would take for integers.
                return TensorHandle(result.data, tl.int1) if result.data.dtype == bool else result
            result = fn(*[_widen(h) for h in handles])
        return TensorHandle(result, tl.int1) if result.dtype == bool else _narrow(result, dtype)

    return op


def _arithmetic_patches(builder):
    formats = _formats()
    stock_fma, stock_dot, stock_atomic = builder.create_fma, builder.create_dot, builder.create_atomic_rmw

    def fma(self, x, y, z):
        if z.dtype.scalar.name not in formats:
            return stock_fma(self, x, y, z)
        # float64 holds the product exactly, so the sum is rounded once to float32 and once to 16 bits.
        return _narrow(_widen(x).astype(np.float64) * _widen(y) + _widen(z), z.dtype.scalar)

    def dot(self, a, b, acc, *rest, **kwargs):
        if not a.dtype.is_floating() or a.data.dtype == np.float64:
            return stock_dot(self, a, b, acc, *rest, **kwargs)
        # As on a GPU, a row's bits do not depend on its place in the tile; BLAS, which np.matmul calls, promises no such thing.
        product = np.einsum("...mk,...kn->...mn", _widen(a).astype(np.float32), _widen(b).astype(np.float32))
        return _narrow(product + _widen(acc), acc.dtype.scalar)

    def atomic(self, rmw_op, ptr, val, mask, *rest, **kwargs):
        if val.dtype.scalar.name not in formats:
            return stock_atomic(self, rmw_op, ptr, val, mask, *rest, **kwargs)
        return _atomic_add(rmw_op, ptr, val, mask)

    elementwise = {name: _lift(getattr(builder, name)) for name in ("unary_op", "binary_op", "ternary_op")}
    return {"create_fma": fma, "create_dot": dot, "create_atomic_rmw": atomic, **elementwise}


def _atomic_add(rmw_op, ptr, val, mask):
    """Atomic add on bit patterns, lane by lane: several lanes may have one address."""
    from triton.runtime import interpreter as stock

    if rmw_op != stock._ir.ATOMIC_OP.FADD:
        raise NotImplementedError(f"atomic {rmw_op} on {val.dtype.scalar}; bf16 and fp8 have atomic_add only")
    dtype, old = val.dtype.scalar, np.zeros(ptr.data.shape, val.data.dtype)
    addend = np.broadcast_to(_widen(val), old.shape)
    for lane in zip(*np.nonzero(np.broadcast_to(mask.data, old.shape))):
        address, one = ptr.data[lane].reshape(1), np.ones(1, bool)
        before = stock._interpreter.load(address, one, old[lane].reshape(1), old.dtype)
        after = _widen(stock.TensorHandle(before, dtype)) + addend[lane]
        stock._interpreter.store(address, _narrow(after, dtype).data, one)
        old[lane] = before[0]
    return stock.TensorHandle(old, dtype)
