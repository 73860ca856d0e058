"""sm_90: warpgroup matrix products, barriers in memory, tensor copies and the proxy fences between them."""

import re

import numpy as np

from .async_proxy import DESCRIPTOR_FIELDS
from .errors import Unsupported
from .instructions_warp import decode
from .parser import bits, unbrace

EMITTERS = {}


def _emits(*names):
    def register(function):
        EMITTERS.update(dict.fromkeys(names, function))
        return function

    return register


@_emits("setmaxnreg")
def _nothing(w, i):
    """Registers are not a scarce resource here."""


@_emits("fence")
def _fence(w, i):
    if "proxy" in i.parts and "async" in i.parts:
        w.line(f"fence_proxy(s, {w.mask})")


@_emits("elect")
def _elect(w, i):
    leader, predicate = (d.strip() for d in i.args[0].split("|"))
    w.result(leader, "np.zeros((1, 1), u4)", "u32")
    w.result(predicate, "s.special['laneid'] == 0", "pred")


@_emits("mapa")
def _mapa(w, i):
    width = bits(i.types[-1])
    w.result(i.args[0], w.raw(i.args[1], width), f"u{width}")


@_emits("mbarrier")
def _mbarrier(w, i):
    operation = i.parts[1]
    if operation == "init":
        return w.line(f"barrier_init(s, {w.here()}, {w.address(i.args[0])}, {w.value(i.args[1], 's32')}, {w.mask})")
    if operation == "inval":
        return None
    if operation in ("try_wait", "test_wait"):
        if "parity" not in i.parts:
            raise Unsupported(i, "only waits by parity are modelled")
        return w.result(i.args[0], f"barrier_test(s, {w.here()}, {w.address(i.args[1])}, {w.raw(i.args[2], 32)}, {w.mask})", "pred")
    if operation not in ("arrive", "expect_tx"):
        raise Unsupported(i)
    has_state = operation == "arrive" and not i.args[0].startswith("[")
    address, *rest = i.args[1:] if has_state else i.args
    amount = w.value(rest[0], "s32") if rest else "np.ones((1, 1), i4)"
    zero = "np.zeros((1, 1), i4)"
    one = "np.ones((1, 1), i4)"
    arrivals, tx = (amount, zero) if "expect_tx" not in i.parts else (one if operation == "arrive" else zero, amount)
    w.line(f"barrier_arrive(s, {w.here()}, {w.address(address)}, {arrivals}, {tx}, {w.mask})")
    if has_state:
        w.result(i.args[0], "np.zeros((1, 1), u8)", "u64")


def emit_bulk(w, i):
    """cp.async.bulk: groups complete at once, tensor copies go through a descriptor."""
    if "commit_group" in i.parts or "wait_group" in i.parts:
        return
    if "tensor" not in i.parts or "tile" in i.parts and "gather4" in i.parts or "im2col" in i.op or "multicast" in i.op:
        raise Unsupported(i, "only tiled tensor copies within one block are modelled")
    loading = i.parts.index("shared") < i.parts.index("global")
    descriptor, coordinates = re.fullmatch(r"\[\s*([^,]+),\s*\{([^}]*)\}\s*\]", i.args[1 if loading else 0]).groups()
    place = ", ".join(w.value(c, "s32") for c in unbrace(coordinates))
    shared = w.address(i.args[0 if loading else 1])
    map_address = w.address(f"[{descriptor.strip()}]")
    if loading:
        w.line(f"tensor_load(s, {w.here()}, {shared}, {map_address}, ({place},), {w.address(i.args[2])}, {w.mask})")
    else:
        reduction = next((p for p in i.parts if p in ("add", "min", "max", "and", "or", "xor")), None) if i.name == "cp" and "reduce" in i.parts else None
        w.line(f"tensor_store(s, {w.here()}, {shared}, {map_address}, ({place},), {reduction!r}, {w.mask})")


@_emits("tensormap")
def _tensormap(w, i):
    if "cp_fenceproxy" in i.parts:
        return w.line(f"copy_descriptor(s, {w.here()}, {w.address(i.args[0])}, {w.address(i.args[1])}, {w.mask})")
    field = i.parts[3]
    if i.parts[1] != "replace" or field not in DESCRIPTOR_FIELDS or "global" in i.parts[4:]:
        raise Unsupported(i)
    ordinal = int(i.args[1], 0) if len(i.args) == 3 else 0
    value = w.value(i.args[-1], f"u{8 * DESCRIPTOR_FIELDS[field][1]}")
    w.line(f"set_descriptor(s, {w.here()}, {w.address(i.args[0])}, {field!r}, {ordinal}, {value}, {w.mask})")


@_emits("wgmma")
def _wgmma(w, i):
    if "mma_async" not in i.parts:
        return
    n, k = (int(x) for x in re.search(r"m64n(\d+)k(\d+)", i.op).groups())
    to, a_type, b_type = i.types[:3]
    if to not in ("f32", "s32") or w.guard or "sp" in i.parts:
        raise Unsupported(i, "wgmma is modelled with f32 and s32 accumulators")
    d, a, b, enable, *signs = i.args
    from_registers = a.startswith("{")
    signs = [int(x, 0) for x in signs]
    # Integers have no signs to flip, and only 16-bit types can be transposed.
    negate, transposed = signs[:2] or [1, 1], signs[2:] or [0, 0]
    if from_registers:
        left = w.temporary(f"fragment_a(s, {a_type!r}, {', '.join(w.raw(r, 32) for r in unbrace(a))})")
        transposed = [0, *transposed[-1:]]
    else:
        left = w.raw(a, 64)
    registers = unbrace(d)
    accumulator = ", ".join(w.value(r, to) for r in registers)
    product = w.temporary(
        f"warpgroup_multiply(s, {w.here()}, {left}, {w.raw(b, 64)}, {(n, k)}, {(a_type, b_type)}, {negate[0] * negate[1]}, "
        f"{tuple(transposed)}, {w.value(enable, 'pred')}, ({accumulator},), {w.mask})"
    )
    for index, register in enumerate(registers):
        w.result(register, f"{product}[{index}]", to)


def _operand(s, i, descriptor, base, rows, k, kind, transposed):
    """[warpgroups, rows, k] from a shared-memory matrix descriptor (PTX ISA, "Matrix descriptor format")."""
    size = (bits(kind) if kind != "tf32" else 32) // 8
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = int((descriptor.flat[0] >> 62) & 3)
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    per_row = width // size
    if transposed:
        outer = (leading, stride) if mode else (stride, leading)
        offset = r // per_row * outer[0] + c // 8 * outer[1] + c % 8 * width + r % per_row * size
    else:
        offset = r // 8 * stride + r % 8 * width + (c * size if mode else c // per_row * leading + c % per_row * size)
    address = start + offset
    address = address ^ (((address >> 7) & (width // 16 - 1)) << 4)
    where = s.shared.locate(s, i, address, size, base)
    s.shared.check_landed(s, i, where, size)
    s.shared.check_fenced(s, i, where)
    return decode(s.shared.words[size].take(where >> (size.bit_length() - 1)), kind)


def warpgroup_multiply(s, i, left, right, shape, kinds, sign, transposed, enable, accumulator, mask):
    """D = A B (+ D): A [64, k] from shared memory or registers, B [k, n] from shared memory, one product per 4 warps."""
    (n, k), (blocks, threads) = shape, s.shape
    groups = blocks * threads // 128
    active = np.ones(groups, bool) if mask is None else np.broadcast_to(mask, s.shape).reshape(groups, 128).any(1)

    def first_lane(value):
        return np.broadcast_to(value, s.shape).reshape(groups, 128)[active, :1, None].astype(np.int64)

    base = first_lane(s.shared_base)
    if left.ndim == 3:
        a = left.reshape(groups, 64, k)[active]
    else:
        a = _operand(s, i, first_lane(left), base, 64, k, kinds[0], transposed[0])
    b = _operand(s, i, first_lane(right), base, n, k, kinds[1], transposed[1])
    dtype = accumulator[0].dtype
    product = np.zeros((groups, 64, n), dtype)
    product[active] = (sign * np.einsum("wmk,wnk->wmn", a, b)).astype(dtype)
    # [groups, warps, halves, 8 rows, tiles of 8 columns, quads, 2] -> [tiles, halves, 2, blocks, threads]
    parts = product.reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(-1, blocks, threads)
    keep = bool(enable.all())
    return [part + (c if keep else np.where(enable, c, dtype.type(0))) for part, c in zip(parts, accumulator)]
