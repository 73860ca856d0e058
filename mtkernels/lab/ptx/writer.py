"""Writes the Python function of one basic block: registers are local variables, arrays of shape [blocks, threads].

An axis has length 1 where the value is the same along it, so block-uniform and thread-only arithmetic stays small.
"""

import re

import numpy as np

from .errors import Unsupported
from .parser import bits

# PTX type -> numpy type its arithmetic is done in, after `decode`.
DTYPES = {f"{kind}{n}": f"{letter}{n // 8}" for n in (8, 16, 32, 64) for kind, letter in (("u", "u"), ("b", "u"), ("s", "i"))}
DTYPES |= {"f16": "f2", "f32": "f4", "f64": "f8", "pred": "?", "tf32": "u4"}
_DECODE = {"bf16": ("u2", "from_bf16({})"), "bf16x2": ("u4", "from_bf16(unpack2({}))"), "f16x2": ("u4", "unpack2({}).view(f2)")}
_ENCODE = {"bf16": ("u2", "to_bf16({})"), "bf16x2": ("u4", "pack2(to_bf16({}))"), "f16x2": ("u4", "pack2(({}).view(u2))")}
_REGISTER = re.compile(r"%?[A-Za-z_$][\w$]*")


class Writer:
    def __init__(self, kernel, storage, constants):
        self.kernel, self.storage, self.constants = kernel, storage, constants
        self.lines, self.temporaries = [], 0
        self.uses, self.defs = set(), set()
        self.views, self.fragments = {}, {}
        self.call_arguments = {}
        self.instruction = self.guard = None

    def start(self, instruction):
        self.instruction = instruction
        self.guard = None
        if instruction.guard:
            name = self.register(instruction.guard)
            self.guard = f"~{name}" if instruction.negated else name

    @property
    def mask(self):
        """Expression of the lanes this instruction runs for; None means all of them."""
        return f"both(m, {self.guard})" if self.guard else "m"

    def line(self, text):
        self.lines.append(text)

    def temporary(self, expression):
        self.temporaries += 1
        self.line(f"t{self.temporaries} = {expression}")
        return f"t{self.temporaries}"

    def constant(self, value):
        name = f"K{len(self.constants)}"
        self.constants[name] = value
        return name

    def here(self):
        """Constant that names the current instruction, for what runs into trouble at run time."""
        return f"I[{self.instruction.index}]"

    # Operands

    def register(self, name):
        if name not in self.storage:
            raise Unsupported(self.instruction, f"operand {name!r} is not known")
        if name not in self.defs:
            self.uses.add(name)
        return local(name)

    def is_register(self, operand):
        return operand in self.storage

    def raw(self, operand, width):
        """Bits of an operand as an unsigned integer."""
        return self.value(operand, f"u{width}")

    def value(self, operand, ptx_type):
        """Expression of an operand in the numpy type that computes `ptx_type`."""
        if ptx_type == "pred":
            return self._predicate(operand)
        if ptx_type in _DECODE:
            dtype, decode = _DECODE[ptx_type]
            return self._cached(operand, ptx_type, lambda: decode.format(self._typed(operand, dtype)))
        return self._typed(operand, DTYPES[ptx_type])

    def _predicate(self, operand):
        if operand.lstrip("-").isdigit():
            return self.constant(np.full((1, 1), int(operand) != 0))
        name = self.register(operand.lstrip("!"))
        return f"~{name}" if operand.startswith("!") else name

    def _cached(self, operand, view, make):
        if not self.is_register(operand):
            return self.temporary(make())
        name = f"{self.register(operand)}_{view}"
        views = self.views.setdefault(operand, {})
        if view not in views:
            self.line(f"{name} = {make()}")
            views[view] = name
        return name

    def _typed(self, operand, dtype):
        if not self.is_register(operand):
            return self._literal(operand, dtype)
        have, size = self.storage[operand], int(dtype[1])
        name = self.register(operand)
        if have == dtype:
            return name
        if int(have[1]) == size:
            return self._cached(operand, dtype, lambda: f"{name}.view({dtype})")
        unsigned = self._typed(operand, f"u{have[1]}")
        return self._cached(operand, dtype, lambda: f"{unsigned}.astype(u{size}).view({dtype})")

    def _literal(self, operand, dtype):
        size = int(dtype[1])
        if operand.startswith("%"):
            special = self.temporary(f"s.special[{operand[1:]!r}]")
            return f"{special}.astype({dtype})" if dtype != "u4" else special
        if (address := self._symbol(operand)) is not None:
            number = address
        elif match := re.fullmatch(r"(-?)0[fFdD]([0-9a-fA-F]+)", operand):
            number = int(match.group(2), 16)
            if size == 8 and len(match.group(2)) == 8:
                return self.constant(np.array([[number]], "u4").view("f4").astype("f8").view(dtype))
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[0-7]*|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
        else:
            raise Unsupported(self.instruction, f"operand {operand!r} is not known")
        return self.constant(np.array([[number % (1 << 8 * size)]], f"u{size}").view(dtype))

    def _symbol(self, operand):
        kernel = self.kernel
        for table in (kernel.shared, kernel.local, kernel.data_addresses):
            if operand in table:
                return table[operand]
        return None

    def address(self, operand, width=64):
        """Expression of "[base + offset]" as a signed 64-bit integer."""
        base, offset = re.fullmatch(r"\[\s*([^\s+\],]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        if self.is_register(base):
            width = 8 * int(self.storage[base][1])
            name = self._cached(base, "address", lambda: f"{self.raw(base, width)}.astype(i8)")
        else:
            name = self._literal(base, "i8")
        offset = int(offset or "0", 0)
        return f"{name} + {offset}" if offset else name

    # Results

    def result(self, destination, expression, ptx_type):
        """Assign an expression in the numpy type of `ptx_type` to a register."""
        if destination == "_":
            return
        dtype = DTYPES.get(ptx_type)
        if ptx_type in _ENCODE:
            dtype, encode = _ENCODE[ptx_type]
            expression = encode.format(expression)
        have = self.storage.get(destination)
        if have is None:
            raise Unsupported(self.instruction, f"destination {destination!r} is not known")
        if have[1:] != dtype[1:]:
            widened = f"i{have[1]}" if dtype[0] == "i" else f"u{have[1]}"
            if dtype[0] == "f":
                expression, widened = f"({expression}).view(u{dtype[1]})", f"u{have[1]}"
            expression, dtype = f"({expression}).astype({widened})", widened
        self._assign(destination, expression, dtype)

    def _assign(self, destination, expression, dtype):
        have, name = self.storage[destination], local(destination)
        old = self.register(destination) if self.guard else None
        self.views.pop(destination, None)
        self.fragments = {k: v for k, v in self.fragments.items() if destination not in k}
        if self.guard:
            if have != dtype:
                expression = f"({expression}).view({have})"
            self.line(f"{name} = where({self.guard}, {expression}, {old})")
        elif have == dtype:
            self.line(f"{name} = {expression}")
        else:
            self.line(f"{name}_{dtype} = {expression}")
            self.line(f"{name} = {name}_{dtype}.view({have})")
            self.views[destination] = {dtype: f"{name}_{dtype}"}
        self.defs.add(destination)

    def assign_raw(self, destination, name, width):
        """Assign an array of unsigned bits that already respects the guard."""
        if destination != "_":
            guard, self.guard = self.guard, None
            self.result(destination, name, f"u{width}")
            self.guard = guard

    def fragment(self, key, expression):
        """Matrix operand built from several registers, kept until one of them changes; key = (role, type, *registers)."""
        if key not in self.fragments:
            self.fragments[key] = self.temporary(expression)
        return self.fragments[key]

    def old(self, destination, width):
        """What a register holds before a guarded instruction, as unsigned bits."""
        if not self.guard or destination == "_":
            return "None"
        return self.raw(destination, width)


def local(register):
    return "v_" + re.sub(r"\W", "_", register.lstrip("%"))


def storage_types(kernel):
    """numpy type in which each register is kept between instructions: the type of its first definition."""
    storage = {}
    for i in kernel.instructions:
        for operand in (i.guard, *i.args):
            for name in _REGISTER.findall(operand) if isinstance(operand, str) else ():
                kind = kernel.register_type(name) if name not in storage else None
                if kind:
                    storage[name] = "?" if kind == "pred" else f"u{bits(kind) // 8}"
    floats = {"f32": "f4", "f64": "f8", "f16": "f2"}
    for i in kernel.instructions:
        if not i.args or not isinstance(i.args[0], str) or i.name in ("st", "setp", "red", "bra"):
            continue
        kind = i.types[0 if i.name in ("cvt", "mma", "wgmma") else -1] if i.types else None
        dtype = floats.get(kind)
        if dtype is None and i.name in ("mov", "selp") and i.args[0] in storage:
            sources = [storage.get(a) for a in i.args[1:3]]
            dtype = next((d for d in sources if d and d[0] == "f"), None)
        for name in _REGISTER.findall(i.args[0]) if dtype else ():
            if storage.get(name) == f"u{dtype[1]}":
                storage[name] = dtype
    return storage
