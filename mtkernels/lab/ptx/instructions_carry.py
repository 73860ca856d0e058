"""Extended-precision arithmetic: add.cc, addc, sub.cc, subc, mad.cc, madc through the carry flag."""

from .errors import Unsupported
from .parser import bits

# The flag is kept like a register, so that it survives basic blocks.
CARRY = "%carry_flag"


def is_extended(i):
    return i.name in ("addc", "subc", "madc") or "cc" in i.parts


def emit(w, i):
    if w.guard:
        raise Unsupported(i, "guarded extended arithmetic is not modelled")
    width = bits(i.types[-1])
    operands = [w.raw(a, width) for a in i.args[1:]]
    if i.name.startswith("mad"):
        a, b, c = operands
        part = f"mul_hi({a}, {b})" if "hi" in i.parts else f"{a} * {b}"
        if "hi" in i.parts and i.types[-1][0] == "s":
            raise Unsupported(i)
        operands = [part, c]
    carry = w.raw(CARRY, 32) if i.name.endswith("c") else "u4.type(0)"
    function = "subtract_borrow" if i.name.startswith("sub") else "add_carry"
    pair = w.temporary(f"{function}({operands[0]}, {operands[1]}, {carry})")
    w.result(i.args[0], f"{pair}[0]", f"u{width}")
    if "cc" in i.parts:
        w.result(CARRY, f"{pair}[1]", "u32")


def add_carry(a, b, carry):
    """(a + b + carry, carry out), for unsigned arrays."""
    partial = a + b
    total = partial + carry.astype(a.dtype)
    return total, ((partial < a) | (total < partial)).astype("u4")


def subtract_borrow(a, b, borrow):
    partial = a - b
    total = partial - borrow.astype(a.dtype)
    return total, ((partial > a) | (total > partial)).astype("u4")
