"""What the 32 lanes of a warp do together: shuffles, votes, matrix loads and mma.sync."""

import re

import numpy as np

from .errors import Unsupported
from .numerics import FP8, from_bf16, to_tf32
from .parser import bits, unbrace

EMITTERS = {}
LANE = np.arange(32)


def _emits(*names):
    def register(function):
        EMITTERS.update(dict.fromkeys(names, function))
        return function

    return register


@_emits("bar", "barrier")
def _bar_warp(w, i):
    """bar.warp.sync and cluster barriers of one block: lanes are in lockstep already."""


@_emits("activemask")
def _activemask(w, i):
    w.result(i.args[0], f"ballot(s, np.ones((1, 1), bool), {w.mask})", "u32")


@_emits("shfl")
def _shfl(w, i):
    first, *second = (d.strip() for d in i.args[0].split("|"))
    value, b, c = (w.raw(a, 32) for a in i.args[1:4])
    mode = next(p for p in i.parts if p in ("bfly", "up", "down", "idx"))
    pair = w.temporary(f"shuffle(s, {w.here()}, {mode!r}, {value}, {b}, {c}, {w.mask})")
    w.result(first, f"{pair}[0]", "u32")
    for d in second:
        w.result(d, f"{pair}[1]", "pred")


@_emits("vote")
def _vote(w, i):
    lanes = f"ballot(s, {w.value(i.args[1], 'pred')}, {w.mask})"
    if "ballot" in i.parts:
        return w.result(i.args[0], lanes, "u32")
    active = f"ballot(s, np.ones((1, 1), bool), {w.mask})"
    test = {"any": f"{lanes} != 0", "all": f"{lanes} == {active}", "uni": f"({lanes} == 0) | ({lanes} == {active})"}
    w.result(i.args[0], test[next(p for p in i.parts if p in test)], "pred")


@_emits("match")
def _match(w, i):
    if "any" not in i.parts:
        raise Unsupported(i, "only match.any is modelled")
    w.result(i.args[0], f"match_any(s, {w.raw(i.args[1], bits(i.types[-1]))}, {w.mask})", "u32")


@_emits("redux")
def _redux(w, i):
    t = i.types[-1]
    operation = next(p for p in i.parts if p in ("add", "min", "max", "and", "or", "xor"))
    w.result(i.args[0], f"reduce_warp(s, {operation!r}, {w.value(i.args[1], t)}, {w.mask})", t)


@_emits("ldmatrix")
def _ldmatrix(w, i):
    targets = unbrace(i.args[0])
    if "b16" not in i.types and "b8" in i.op:
        raise Unsupported(i)
    call = f"load_matrices(s, {w.here()}, {w.address(i.args[1])}, {len(targets)}, {'trans' in i.parts}, {w.mask})"
    loaded = w.temporary(call)
    for n, target in enumerate(targets):
        w.result(target, f"{loaded}[{n}]", "u32")


@_emits("stmatrix")
def _stmatrix(w, i):
    sources = ", ".join(w.raw(x, 32) for x in unbrace(i.args[1]))
    w.line(f"store_matrices(s, {w.here()}, {w.address(i.args[0])}, ({sources},), {'trans' in i.parts}, {w.mask})")


@_emits("mma")
def _mma(w, i):
    k = int(re.search(r"m16n8k(\d+)", i.op).group(1)) if "m16n8k" in i.op else 0
    to, a_type, b_type, accumulator = i.types[:4]
    if not k or "sp" in i.parts or to not in ("f32", "s32", "f16") or a_type in ("s4", "u4", "f64"):
        raise Unsupported(i, "mma.sync is modelled for m16n8 shapes with f32, f16 or s32 accumulators")
    d, a, b, c = (unbrace(x) for x in i.args[:4])
    fragments = []
    for role, registers, t in (("a", a, a_type), ("b", b, b_type)):
        names = [w.raw(r, 32) for r in registers]
        fragments.append(w.fragment((role, t, *registers), f"fragment_{role}(s, {t!r}, {', '.join(names)})"))
    packed = to == "f16"
    names = [w.raw(r, 32) if packed else w.value(r, to) for r in c]
    product = w.temporary(f"multiply(s, {fragments[0]}, {fragments[1]}, {to!r}, ({', '.join(names)},), {w.mask})")
    for n, register in enumerate(d):
        w.result(register, f"{product}[{n}]", "u32" if packed else to)


def _warps(s, value):
    return np.broadcast_to(value, s.shape).reshape(-1, 32)


def ballot(s, predicate, mask):
    lanes = _warps(s, predicate if mask is None else predicate & mask)
    packed = np.packbits(lanes, axis=1, bitorder="little").view("u4")
    return np.repeat(packed, 32, axis=1).reshape(s.shape)


def shuffle(s, i, mode, value, b, c, mask):
    """(values, predicate): the lane's own value where the source lies outside its segment."""
    b, c = b.astype(np.int64) & 31, c.astype(np.int64)
    segment, clamp = (c >> 8) & 31, c & 31
    if b.shape[1] > 1 or c.shape[1] > 1 or max(b.shape[0], c.shape[0]) > 1:
        b, segment, clamp = (_warps(s, x) for x in (b, segment, clamp))
    low = LANE & segment
    last = low | (clamp & ~segment & 31)
    source = {"bfly": LANE ^ b, "down": LANE + b, "up": LANE - b, "idx": low | (b & ~segment & 31)}[mode]
    valid = source >= last if mode == "up" else source <= last
    source = np.where(valid, source, LANE) & 31
    lanes = _warps(s, value)
    if mask is not None:
        active = _warps(s, mask)
        missing = active & ~np.take_along_axis(active, np.broadcast_to(source, active.shape), 1)
        if missing.any():
            raise s.finding("shuffle reads from an inactive lane", i, "", missing.reshape(s.shape))
    if source.shape[0] == 1:
        return lanes.take(source[0], axis=1).reshape(s.shape), _tile(valid, s.shape)
    return np.take_along_axis(lanes, source, 1).reshape(s.shape), valid.reshape(s.shape)


def _tile(per_lane, shape):
    return np.tile(per_lane, (1, shape[1] // 32))


def match_any(s, value, mask):
    lanes = _warps(s, value)
    equal = lanes[:, :, None] == lanes[:, None, :]
    if mask is not None:
        equal &= _warps(s, mask)[:, None, :]
    return np.packbits(equal, axis=2, bitorder="little").view("u4").reshape(s.shape)


def reduce_warp(s, operation, value, mask):
    lanes = _warps(s, value)
    info = np.iinfo(value.dtype)
    neutral = {"add": 0, "or": 0, "xor": 0, "and": -1 if info.min else info.max, "min": info.max, "max": info.min}[operation]
    if mask is not None:
        lanes = np.where(_warps(s, mask), lanes, value.dtype.type(neutral))
    function = dict(add=np.add, min=np.minimum, max=np.maximum, xor=np.bitwise_xor)
    function |= {"and": np.bitwise_and, "or": np.bitwise_or}
    total = function[operation].reduce(lanes, axis=1, dtype=value.dtype)
    return np.repeat(total, 32).reshape(s.shape)


def _row_offsets(s, i, address, count, mask):
    """Offsets [warps, 8 * count] of 16-byte rows; the first 8 * count lanes of a warp give the addresses."""
    used = np.broadcast_to(LANE < 8 * count, (1, 32))
    rows = np.broadcast_to(address, s.shape)
    lanes = _tile(used, s.shape) if mask is None else _tile(used, s.shape) & mask
    if mask is None:
        rows, base = _warps(s, rows)[:, : 8 * count], _warps(s, s.shared_base)[:, : 8 * count]
    else:
        rows = np.where(lanes, rows, rows[np.unravel_index(lanes.argmax(), s.shape)])
        rows, base = _warps(s, rows)[:, : 8 * count], _warps(s, s.shared_base)[:, : 8 * count]
    if s.counters:
        s.counters.access(s, i, "shared", address, np.broadcast_to(lanes, s.shape), 16)
    return s.shared.locate(s, i, rows, 16, base)


def load_matrices(s, i, address, count, transposed, mask):
    offset = _row_offsets(s, i, address, count, mask)
    if s.copies:
        s.shared.check_landed(s, i, offset, 16)
    # [warps, matrices, rows, words of two elements]
    tiles = s.shared.words[4].take((offset >> 2)[..., None] + np.arange(4)).reshape(-1, count, 8, 4)
    if transposed:
        halves = tiles.view("u2").transpose(0, 1, 3, 2)
        tiles = np.ascontiguousarray(halves).view("u4")
    return [tiles[:, n].reshape(s.shape) for n in range(count)]


def store_matrices(s, i, address, values, transposed, mask):
    count = len(values)
    offset = _row_offsets(s, i, address, count, mask)
    tiles = np.stack([_warps(s, v).reshape(-1, 8, 4) for v in values], 1)
    if transposed:
        halves = tiles.view("u2").transpose(0, 1, 3, 2)
        tiles = np.ascontiguousarray(halves).view("u4")
    index = (offset >> 2)[..., None] + np.arange(4)
    keep = slice(None) if mask is None else _warps(s, mask).any(1)
    if s.shared.dirty is not None:
        s.shared.dirty[index[keep]] = 1
    s.shared.words[4][index[keep]] = tiles.reshape(len(tiles), -1, 4)[keep]


def decode(raw, kind):
    """Operand elements as float32 (integers as float64, which holds their sums exactly)."""
    if kind == "bf16":
        return from_bf16(raw)
    if kind == "f16":
        return raw.view("f2").astype(np.float32)
    if kind == "tf32":
        return to_tf32(raw.view(np.float32), toward_zero=True)
    if kind[:4] in FP8:
        return FP8[kind[:4]][raw]
    return raw.view(f"{'i' if kind[0] == 's' else 'u'}1").astype(np.float64)


def _elements(value, kind, s):
    """[warps, 8 groups, 4 quads, elements per register]."""
    width = bits(kind) if kind != "tf32" else 32
    return np.ascontiguousarray(_warps(s, value)).view(f"u{width // 8}").reshape(-1, 8, 4, 32 // width)


def fragment_a(s, kind, *registers):
    """[warps, 16, K] of row = group + 8 (r % 2), column = elements * quad + e + 4 elements * (r // 2)."""
    parts = [_elements(r, kind, s) for r in registers]
    warps, _, _, e = parts[0].shape
    tile = np.empty((warps, 2, 8, len(parts) // 2, 4, e), parts[0].dtype)
    for r, part in enumerate(parts):
        tile[:, r % 2, :, r // 2] = part
    return decode(tile, kind).reshape(warps, 16, -1)


def fragment_b(s, kind, *registers):
    """[warps, K, 8] of row = elements * quad + e + 4 elements * r, column = group."""
    parts = [_elements(r, kind, s) for r in registers]
    warps, _, _, e = parts[0].shape
    tile = np.empty((warps, len(parts), 4, e, 8), parts[0].dtype)
    for r, part in enumerate(parts):
        tile[:, r] = part.transpose(0, 2, 3, 1)
    return decode(tile, kind).reshape(warps, -1, 8)


def multiply(s, a, b, kind, accumulator, mask):
    """D = A B + C in the registers' layout; f16 accumulators come as packed pairs."""
    product = np.einsum("wmk,wkn->wmn", a, b).reshape(-1, 2, 8, 4, 2)
    if kind == "f16":
        c = [np.ascontiguousarray(_warps(s, x)).view("f2").reshape(-1, 8, 4, 2) for x in accumulator]
        halves = [np.ascontiguousarray((product[:, h] + c[h]).astype("f2")) for h in (0, 1)]
        return [x.view("u4").reshape(s.shape) for x in halves]
    product = product.astype(np.int64).astype("i4") if kind == "s32" else product
    return [c + product[:, n // 2, :, :, n % 2].reshape(s.shape) for n, c in enumerate(accumulator)]
