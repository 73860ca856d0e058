"""Number formats and integer functions that numpy lacks, on arrays of any shape."""

import numpy as np

U8, U16, U32, U64 = (np.dtype(f"u{n}") for n in (1, 2, 4, 8))


def from_bf16(raw):
    return (raw.astype(U32) << 16).view(np.float32)


def to_bf16(value):
    """Nearest even; every NaN becomes 0x7FFF, as the hardware makes it."""
    raw = np.asarray(value, np.float32).view(U32)
    rounded = ((raw + ((raw >> 16) & 1) + 0x7FFF) >> 16).astype(U16)
    return np.where(value != value, U16.type(0x7FFF), rounded)


def to_tf32(value, toward_zero=False):
    """float32 whose mantissa keeps 10 bits; ties away from zero (cvt.rna) or cut off, as the tensor core reads operands."""
    raw = np.asarray(value, np.float32).view(U32)
    return ((raw if toward_zero else raw + 0x1000) & 0xFFFFE000).view(np.float32)


def _fp8_values(exponent_bits, mantissa_bits):
    bias = (1 << (exponent_bits - 1)) - 1
    code = np.arange(256)
    exponent, mantissa = (code >> mantissa_bits) & ((1 << exponent_bits) - 1), code & ((1 << mantissa_bits) - 1)
    normal = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
    value = np.where(exponent == 0, mantissa / 2**mantissa_bits * 2.0 ** (1 - bias), normal)
    if exponent_bits == 5:
        top = exponent == 31
        value = np.where(top & (mantissa == 0), np.inf, np.where(top, np.nan, value))
    else:
        value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


FP8 = {"e4m3": _fp8_values(4, 3), "e5m2": _fp8_values(5, 2)}


def to_fp8(value, kind):
    """Nearest even, saturating to the largest finite number."""
    table = FP8[kind][:128]
    finite = table[np.isfinite(table)]
    magnitude = np.abs(np.asarray(value, np.float32))
    above = np.clip(np.searchsorted(finite, magnitude), 1, len(finite) - 1)
    middle = (finite[above - 1].astype(np.float64) + finite[above]) / 2
    code = np.where((magnitude > middle) | ((magnitude == middle) & (above % 2 == 0)), above, above - 1)
    code = np.where(np.isnan(magnitude), 0x7F, code)
    return (code | np.where(np.signbit(value), 128, 0)).astype(U8)


def fma32(a, b, c):
    """The product is exact in float64; the sum is rounded there and once more, which differs from one rounding in 2^-29 of cases."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def unpack2(raw):
    """32-bit words -> their two 16-bit halves on a new last axis."""
    return np.stack([raw & 0xFFFF, raw >> 16], -1).astype(U16)


def pack2(halves):
    return halves[..., 0].astype(U32) | (halves[..., 1].astype(U32) << 16)


def mul_hi(a, b):
    """High half of a product; 64-bit operands in 32-bit pieces."""
    if a.dtype.itemsize < 8:
        wide = np.dtype(f"{a.dtype.kind}8")
        return ((a.astype(wide) * b.astype(wide)) >> (8 * a.dtype.itemsize)).astype(a.dtype)
    ua, ub = a.view(U64), b.view(U64)
    low, half = U64.type(0xFFFFFFFF), U64.type(32)
    mid = (ua >> half) * (ub & low) + (((ua & low) * (ub & low)) >> half)
    high = (ua >> half) * (ub >> half) + (mid >> half) + (((ua & low) * (ub >> half) + (mid & low)) >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, ub, U64.type(0)) - np.where(b < 0, ua, U64.type(0))
    return high.view(a.dtype)


def div_trunc(a, b):
    if a.dtype.kind == "u":
        return a // b
    quotient = a // b
    return quotient + ((a - quotient * b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def rem_trunc(a, b):
    return np.fmod(a, b)


def shift_left(a, amount):
    return a << np.minimum(amount, U32.type(64)).astype(a.dtype)


def shift_right(a, amount):
    """numpy fills with the sign (or zero) when the amount reaches the width, as PTX does."""
    return a >> np.minimum(amount, U32.type(64)).astype(a.dtype)


def funnel(low, high, amount, left, wrap):
    both = low.astype(U64) | (high.astype(U64) << U64.type(32))
    amount = (amount & 31 if wrap else np.minimum(amount, 32)).astype(U64)
    return ((both << amount) >> U64.type(32) if left else both >> amount).astype(U32)


def float_to_int(value, rounding, dtype):
    """Saturating conversion; NaN gives 0."""
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](value.astype(np.float64))
    info = np.iinfo(dtype)
    top = float(info.max) if dtype.itemsize < 8 else float(info.max) - 2048.0
    result = np.clip(np.nan_to_num(rounded, nan=0.0), float(info.min), top).astype(dtype)
    return np.where(rounded >= float(info.max), info.max, result).astype(dtype)


def extract(a, position, length):
    """bfe: sign-extending for signed a."""
    width = 8 * a.dtype.itemsize
    position, length = position.astype(np.int64) & 255, length.astype(np.int64) & 255
    unsigned = a.view(f"u{a.dtype.itemsize}").astype(U64)
    mask = np.where(length >= 64, U64.type(2**64 - 1), (U64.type(1) << np.minimum(length, 63).astype(U64)) - U64.type(1))
    field = np.where(position < width, unsigned >> np.minimum(position, 63).astype(U64), U64.type(0)) & mask
    if a.dtype.kind == "i":
        last = np.minimum(position + length - 1, width - 1).clip(0).astype(U64)
        sign = (unsigned >> last) & U64.type(1)
        keep = np.minimum(length, np.maximum(width - position, 0))
        low = np.where(keep >= 64, U64.type(2**64 - 1), (U64.type(1) << np.minimum(keep, 63).astype(U64)) - U64.type(1))
        field = np.where((length > 0) & (sign == 1), field | ~low, field)
    return field.astype(f"u{a.dtype.itemsize}").view(a.dtype)


def insert(a, b, position, length):
    """bfi: the low `length` bits of a replace those of b at `position`."""
    position, length = (x.astype(U64) & U64.type(255) for x in (position, length))
    mask = (((U64.type(1) << length) - U64.type(1)) << position).astype(a.dtype)
    return (b & ~mask) | ((a << position.astype(a.dtype)) & mask)


def permute_bytes(a, b, selector):
    both = a.astype(U64) | (b.astype(U64) << U64.type(32))
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), U32)
    for k in range(4):
        s = (selector >> (4 * k)) & 15
        byte = ((both >> ((s & 7).astype(U64) * U64.type(8))) & U64.type(255)).astype(U32)
        sign = np.where(byte & 128, U32.type(255), U32.type(0))
        result = result | (np.where(s & 8, sign, byte) << U32.type(8 * k))
    return result


def lop3(a, b, c, table):
    result = a & 0
    for bit in range(8):
        if table >> bit & 1:
            result = result | ((a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c))
    return result


def popcount(a):
    return np.bitwise_count(a).astype(U32)


def leading_zeros(a):
    width = 8 * a.dtype.itemsize
    length = np.zeros(a.shape, U32)
    for k in (32, 16, 8, 4, 2, 1):
        if k < width:
            high = (a >> a.dtype.type(k)) != 0
            length = length + np.where(high, U32.type(k), U32.type(0))
            a = np.where(high, a >> a.dtype.type(k), a)
    return U32.type(width) - length - (a != 0).astype(U32)


def reverse_bits(a):
    result = a & 0
    for k in range(8 * a.dtype.itemsize):
        result = (result << a.dtype.type(1)) | ((a >> a.dtype.type(k)) & a.dtype.type(1))
    return result
