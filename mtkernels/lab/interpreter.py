"""Repair the 16-bit and 8-bit floats of Triton's CPU interpreter.

The stock interpreter keeps bf16 and fp8 as bit patterns: casts to them truncate, and arithmetic, comparisons and dot
work on the patterns themselves. `install()` makes casts round to nearest even (fp8 saturating, as `cvt.rn.satfinite`)
and computes on the values: elementwise in float32 with one rounding, dot with float32 accumulation.

    install()            # for the process; again is a no-op
    with repaired(): ... # or for a block
"""

import os
from contextlib import contextmanager

import numpy as np
import torch

_originals = {}


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def install():
    """Patch the interpreter. Does nothing outside TRITON_INTERPRET=1 or when already installed."""
    if _originals or not interpreting():
        return
    from triton.runtime.interpreter import InterpreterBuilder

    for name, patch in _patches(InterpreterBuilder).items():
        _originals[name] = InterpreterBuilder.__dict__.get(name)
        setattr(InterpreterBuilder, name, patch)


def uninstall():
    """Put the stock interpreter back."""
    if not _originals:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    for name, stock in _originals.items():
        if stock is None:
            delattr(InterpreterBuilder, name)
        else:
            setattr(InterpreterBuilder, name, stock)
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


def _formats():
    """Triton dtype -> (torch dtype, bit-pattern dtypes of numpy and torch, largest finite value to saturate at)."""
    import triton.language as tl

    return {
        tl.bfloat16: (torch.bfloat16, np.uint16, torch.uint16, None),
        tl.float8e4nv: (torch.float8_e4m3fn, np.uint8, torch.uint8, 448.0),
        tl.float8e5: (torch.float8_e5m2, np.uint8, torch.uint8, 57344.0),
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


def _patches(builder):
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    formats = _formats()
    stock = {name: getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot", "create_fma")}

    def widen(handle):
        fmt = formats.get(handle.dtype.scalar)
        return handle.data if fmt is None else _values(handle.data, fmt)

    def narrow(values, dtype):
        fmt = formats.get(dtype)
        return TensorHandle(values.astype(_get_np_dtype(dtype)) if fmt is None else _patterns(values, fmt), dtype)

    def cast(self, src, dst_type, *rest, **kwargs):
        src_dtype, dst = src.dtype.scalar, dst_type.scalar
        if src_dtype == dst or not (src_dtype in formats or dst in formats):
            return stock["cast_impl"](self, src, dst_type, *rest, **kwargs)
        return narrow(widen(src), dst)

    def fp_to_fp(self, src, dst_type, *rest, **kwargs):
        if src.dtype.scalar in formats or dst_type.scalar in formats:
            return cast(self, src, dst_type)
        return stock["create_fp_to_fp"](self, src, dst_type, *rest, **kwargs)

    def lift(name):
        original = getattr(builder, name)

        def op(self, *args):
            *handles, fn = args
            # np.where moves patterns unchanged; a GPU does not warn about inf and NaN.
            with np.errstate(all="ignore"):
                dtype = next((h.dtype.scalar for h in handles if h.dtype.scalar in formats), None)
                if dtype is None or fn is np.where:
                    result = original(self, *args)
                    # Stock comparisons keep the operand's dtype, which a later splat to a mask would take for integers.
                    return TensorHandle(result.data, tl.int1) if result.data.dtype == bool else result
                result = fn(*[widen(h) for h in handles])
            return TensorHandle(result, tl.int1) if result.dtype == bool else narrow(result, dtype)

        return op

    def fma(self, x, y, z):
        if z.dtype.scalar not in formats:
            return stock["create_fma"](self, x, y, z)
        # float64 holds the product exactly, so the sum is rounded once to float32 and once to 16 bits.
        return narrow(widen(x).astype(np.float64) * widen(y) + widen(z), z.dtype.scalar)

    def dot(self, a, b, acc, *rest, **kwargs):
        if not a.dtype.is_floating() or a.data.dtype == np.float64:
            return stock["create_dot"](self, a, b, acc, *rest, **kwargs)
        product = np.matmul(widen(a).astype(np.float32), widen(b).astype(np.float32))
        return narrow(product + widen(acc), acc.dtype.scalar)

    def bf16(self, value):
        return narrow(np.array([value], np.float32), tl.bfloat16)

    return {
        "cast_impl": cast,
        "create_fp_to_fp": fp_to_fp,
        "create_fma": fma,
        "create_dot": dot,
        "get_bf16": bf16,
        **{name: lift(name) for name in ("unary_op", "binary_op", "ternary_op")},
    }
