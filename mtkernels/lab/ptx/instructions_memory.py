"""Loads, stores, atomics and asynchronous copies: emitters first, then what they call at run time.

At run time `s` is the wave (the blocks in lockstep), `i` the instruction, addresses are signed 64-bit arrays and a mask of
None means every lane.
"""

import numpy as np

from .errors import Unsupported
from .parser import bits, unbrace

EMITTERS = {}
_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def _emits(*names):
    def register(function):
        EMITTERS.update(dict.fromkeys(names, function))
        return function

    return register


def _space(i):
    for space in ("shared", "local", "global", "const"):
        if space in i.parts:
            return "global" if space == "const" else space
    return "global"


@_emits("ld", "ldu")
def _ld(w, i):
    width, targets = bits(i.types[-1]), unbrace(i.args[0])
    # A signed load extends its sign into a wider register.
    kind = "s" if i.types[-1][0] == "s" else "u"
    view = f".view(i{width // 8})" if kind == "s" else ""
    name, offset = (i.args[1].strip("[] ").split("+") + ["0"])[:2]
    # A register holds the address of one of several parameters.
    if "param" in i.parts and not w.is_register(name.strip()):
        if name.strip() not in w.kernel.params:
            # The value a call returned; nobody looks at the one of vprintf.
            return w.result(targets[0], f"np.zeros((1, 1), u{width // 8})", f"u{width}")
        for n, target in enumerate(targets):
            value = f"s.parameter({name.strip()!r}, {int(offset, 0) + n * width // 8}, {width // 8}){view}"
            w.result(target, value, f"{kind}{width}")
        return
    old = ", ".join(w.old(t, width) for t in targets)
    address = w.address(i.args[1])
    loaded = w.temporary(f"load(s, {w.here()}, {_space(i)!r}, {address}, {w.mask}, {width // 8}, {len(targets)}, ({old},))")
    # The load has respected the guard already.
    guard, w.guard = w.guard, None
    for n, target in enumerate(targets):
        w.result(target, f"{loaded}[{n}]{view}", f"{kind}{width}")
    w.guard = guard


@_emits("call")
def _call(w, i):
    """Only what device_assert and device_print call."""
    if "__assertfail" in i.text:
        first = i.args[1].strip("() ").split(",")[0]
        message = w.call_arguments.get(first, "None")
        w.line(f"assertion_failed(s, {w.here()}, {message}, {w.mask})")
    elif "vprintf" not in i.text:
        raise Unsupported(i, "calls are not modelled (mark helpers inline)")
    w.call_arguments = {}


@_emits("st")
def _st(w, i):
    if "param" in i.parts:
        w.call_arguments[i.args[0].strip("[] ").split("+")[0]] = w.raw(i.args[1], bits(i.types[-1]))
        return
    width, sources = bits(i.types[-1]), unbrace(i.args[1])
    values = ", ".join(w.raw(x, width) for x in sources)
    w.line(f"store(s, {w.here()}, {_space(i)!r}, {w.address(i.args[0])}, {w.mask}, {width // 8}, ({values},))")


@_emits("atom", "red")
def _atom(w, i):
    operands = i.args if i.name == "red" else i.args[1:]
    t = i.types[-1]
    operation = next(p for p in i.parts if p in _ATOMICS)
    if t in ("f16x2", "bf16x2") or _space(i) == "local":
        raise Unsupported(i, "packed atomics are not modelled")
    width, vectors = bits(t), [unbrace(x) for x in operands[1:]]
    address = w.address(operands[0])
    targets = ["_"] * len(vectors[0]) if i.name == "red" else unbrace(i.args[0])
    mask = w.temporary(w.mask)
    for n, target in enumerate(targets):
        values = ", ".join(w.raw(vector[n], width) for vector in vectors)
        place = f"{address} + {n * width // 8}"
        call = f"atomic(s, {w.here()}, {place}, {mask}, {_space(i)!r}, {operation!r}, {t!r}, ({values},), {w.old(target, width)})"
        if target == "_":
            w.line(call)
        else:
            w.assign_raw(target, w.temporary(call), width)


@_emits("cp")
def _cp(w, i):
    if "bulk" in i.parts:
        from .instructions_hopper import emit_bulk

        return emit_bulk(w, i)
    if "async" not in i.parts:
        raise Unsupported(i)
    if "mbarrier" in i.parts:
        w.line(f"wait_copies(s, {w.mask}, -1)")
        arrivals = "np.ones((1, 1), i4)" if "noinc" in i.parts else "np.zeros((1, 1), i4)"
        return w.line(f"barrier_arrive(s, {w.here()}, {w.address(i.args[0])}, {arrivals}, np.zeros((1, 1), i4), {w.mask})")
    if "commit_group" in i.parts:
        w.line(f"s.copies_committed = s.advance(s.copies_committed, {w.mask})")
    elif "wait_group" in i.parts or "wait_all" in i.parts:
        if "wait_all" in i.parts:
            w.line(f"s.copies_committed = s.advance(s.copies_committed, {w.mask})")
        w.line(f"wait_copies(s, {w.mask}, {int(i.args[0], 0) if i.args else 0})")
    else:
        size = int(i.args[2], 0)
        has_size = len(i.args) > 3 and not (len(i.args) == 4 and "cache_hint" in i.parts)
        real = w.value(i.args[3], "s32") if has_size else "None"
        w.line(f"copy_async(s, {w.here()}, {w.address(i.args[0])}, {w.address(i.args[1])}, {size}, {real}, {w.mask})")


@_emits("prefetch", "prefetchu", "discard", "applypriority", "membar", "nanosleep", "pragma", "griddepcontrol")
def _nothing(w, i):
    """No effect on values: every access of the emulator is performed in order."""


@_emits("createpolicy")
def _createpolicy(w, i):
    w.result(i.args[0], "np.zeros((1, 1), u8)", "u64")


def assertion_failed(s, i, message, mask):
    lanes = np.ones(s.shape, bool) if mask is None else np.broadcast_to(mask, s.shape)
    if lanes.any():
        text = ""
        if message is not None:
            start = s.memory.locate(s, i, message[:1, :1].astype(np.int64), 1)
            text = bytes(s.memory.words[1][int(start[0, 0]) : int(start[0, 0]) + 200]).split(b"\0")[0].decode(errors="replace")
        raise s.finding("device assertion failed", i, text, lanes)


def settle(address, mask):
    """Addresses with every masked lane moved to an active one; None if no lane is active."""
    if mask is None or mask.all():
        return address, None
    if not mask.any():
        return None, mask
    shape = np.broadcast_shapes(address.shape, mask.shape)
    address, mask = np.broadcast_to(address, shape), np.broadcast_to(mask, shape)
    return np.where(mask, address, address[np.unravel_index(mask.argmax(), shape)]), mask


def _locate(s, i, space, address, size):
    """(offsets, memory) of `size` bytes at each address."""
    if space == "global":
        return s.memory.locate(s, i, address, size), s.memory
    memory, base = (s.shared, s.shared_base) if space == "shared" else (s.local, s.local_base)
    return memory.locate(s, i, address, size, base, f"{space} memory"), memory


def _count(s, i, space, address, mask, size):
    if s.counters and space != "local":
        s.counters.access(s, i, space, address, mask, size)


def load(s, i, space, address, mask, size, count, old):
    """`count` arrays of `size`-byte unsigned words per lane; inactive lanes keep `old`."""
    settled, mask = settle(address, mask)
    if settled is None:
        return [np.zeros((1, 1), f"u{size}") if o is None else o for o in old]
    offset, memory = _locate(s, i, space, settled, size * count)
    if space == "shared" and s.copies:
        memory.check_landed(s, i, offset, size * count)
    _count(s, i, space, address, mask, size * count)
    index = offset >> (size.bit_length() - 1)
    if count == 1:
        values = [memory.words[size].take(index)]
    else:
        values = list(memory.words[size].take(index + np.arange(count).reshape(-1, 1, 1)))
    if mask is None:
        return values
    return [np.where(mask, v, v.dtype.type(0) if o is None else o) for v, o in zip(values, old)]


def store(s, i, space, address, mask, size, values):
    settled, mask = settle(address, mask)
    if settled is None:
        return
    offset, memory = _locate(s, i, space, settled, size * len(values))
    _count(s, i, space, address, mask, size * len(values))
    if space == "shared" and memory.dirty is not None:
        memory.dirty[offset[... if mask is None else np.broadcast_to(mask, offset.shape)] >> 2] = 1
    shape = np.broadcast_shapes(offset.shape, *(v.shape for v in values))
    index = np.broadcast_to(offset >> (size.bit_length() - 1), shape)
    lanes = ... if mask is None else np.broadcast_to(mask, shape)
    for n, value in enumerate(values):
        memory.words[size][index[lanes] + n] = np.broadcast_to(value, shape)[lanes]


def combine(operation, kind, old, operands):
    """New contents of distinct cells."""
    if operation in ("exch", "cas"):
        return operands[0] if operation == "exch" else np.where(old == operands[0], operands[1], old)
    letter = {"f": "f", "s": "i"}.get(kind[0], "u")
    if kind == "bf16":
        from .numerics import from_bf16, to_bf16

        return to_bf16(from_bf16(old) + from_bf16(operands[0]))
    a, b = (x.view(f"{letter}{x.dtype.itemsize}") for x in (old, operands[0]))
    functions = dict(add=np.add, min=np.minimum, max=np.maximum, xor=np.bitwise_xor)
    functions |= {"and": np.bitwise_and, "or": np.bitwise_or}
    functions["inc"] = lambda a, b: np.where(a >= b, 0, a + 1).astype(a.dtype)
    functions["dec"] = lambda a, b: np.where((a == 0) | (a > b), b, a - 1)
    return functions[operation](a, b).view(old.dtype)


def atomic(s, i, address, mask, space, operation, kind, values, old=None):
    """Lanes act one after another, in block and thread order; returns what each found."""
    size = bits(kind) // 8
    shape = s.shape
    lanes = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
    result = np.array(np.broadcast_to(0 if old is None else old, shape), f"u{size}")
    settled, _ = settle(np.broadcast_to(address, shape), mask)
    if settled is None:
        return result
    offset, memory = _locate(s, i, space, settled, size)
    _count(s, i, space, address, lanes, size)
    words, offset = memory.words[size], np.broadcast_to(offset, shape)[lanes]
    values = [np.broadcast_to(v, shape)[lanes] for v in values]
    index = offset >> (size.bit_length() - 1)
    found, waiting = np.zeros(index.shape, f"u{size}"), np.arange(index.size)
    while waiting.size:
        cells, first = np.unique(index[waiting], return_index=True)
        turn = waiting[first]
        found[turn] = words[cells]
        words[cells] = combine(operation, kind, found[turn], [v[turn] for v in values])
        waiting = np.delete(waiting, first)
    result[lanes] = found
    return result


def copy_async(s, i, target, source, size, real, mask):
    """cp.async: the bytes land at once, but the words stay owned by the copy until its group is waited for."""
    shape = s.shape
    lanes = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
    if not lanes.any():
        return
    amount = np.full(shape, size) if real is None else np.broadcast_to(real, shape)
    target = np.broadcast_to(target, shape)
    settled = np.where(lanes, target, target[np.unravel_index(lanes.argmax(), shape)])
    offset = s.shared.locate(s, i, settled, size, s.shared_base)
    word = 4 if size >= 4 else size
    count = size // word
    data = np.zeros((count, *shape), f"u{word}")
    for n in np.unique(amount[lanes]):
        if n:
            _copy_words(s, i, source, lanes & (amount == n), int(n), size, data)
    _count(s, i, "global", source, lanes & (amount > 0), size)
    _count(s, i, "shared", target, lanes, size)
    words = (offset[lanes] >> 2) + np.arange(count).reshape(-1, 1)
    s.shared.words[4][words] = data[:, lanes]
    s.shared.pending[words] = i.index + 1
    s.copies.append((s.copies_committed, offset >> 2, count, lanes))


def _copy_words(s, i, source, mask, amount, size, data):
    """Fill `data` [words, blocks, threads] for the lanes that read `amount` bytes; the rest of a destination is zero."""
    if amount % 4:
        raise Unsupported(i, f"a source size of {amount} bytes is not a multiple of 4")
    settled, _ = settle(np.broadcast_to(source, mask.shape), mask)
    offset = s.memory.locate(s, i, settled, amount, size)
    for n in range(amount // 4):
        data[n] = np.where(mask, s.memory.words[4].take((offset >> 2) + n), data[n])


def wait_copies(s, mask, allowed):
    """All but the `allowed` youngest committed groups of these lanes have landed."""
    remaining = []
    for group, word, count, lanes in s.copies:
        done = lanes & (group < s.copies_committed - allowed)
        if mask is not None:
            done = done & mask
        if done.any():
            s.shared.pending[word[done] + np.arange(count).reshape(-1, 1)] = 0
            lanes = lanes & ~done
        if lanes.any():
            remaining.append((group, word, count, lanes))
    s.copies = remaining
