"""Emitters of arithmetic, logic, conversions and moves: each writes numpy expressions for one instruction."""

from .errors import Unsupported
from .numerics import FP8
from .parser import bits, unbrace

EMITTERS = {}
_FLOATS = ("f16", "f32", "f64", "bf16", "f16x2", "bf16x2")
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_UNARY = {
    "neg": "-{0}",
    "abs": "np.abs({0})",
    "ex2": "np.exp2({0})",
    "lg2": "np.log2({0})",
    "rcp": "1 / {0}",
    "sqrt": "np.sqrt({0})",
    "rsqrt": "1 / np.sqrt({0})",
    "tanh": "np.tanh({0})",
    "sin": "np.sin({0})",
    "cos": "np.cos({0})",
}


def emits(*names):
    def register(function):
        EMITTERS.update(dict.fromkeys(names, function))
        return function

    return register


def _sources(w, i, ptx_type, count=2):
    return [w.value(a, ptx_type) for a in i.args[1 : 1 + count]]


def _unsigned(ptx_type):
    """Two's complement addition and multiplication do not see the sign."""
    return ptx_type.replace("s", "u") if ptx_type[0] == "s" else ptx_type


@emits("add", "sub")
def _add(w, i):
    t = _unsigned(i.types[-1])
    a, b = _sources(w, i, t)
    expression = f"{a} {'+' if i.name == 'add' else '-'} {b}"
    w.result(i.args[0], f"np.clip({expression}, f4.type(0), f4.type(1))" if "sat" in i.parts else expression, t)


@emits("mul", "mad")
def _mul(w, i):
    t = i.types[-1]
    if t not in _FLOATS and "wide" not in i.parts and "hi" not in i.parts:
        t = _unsigned(t)
    a, b = _sources(w, i, t)
    if "wide" in i.parts:
        t = f"{t[0]}{2 * bits(t)}"
        wide = f"{'i' if t[0] == 's' else 'u'}{bits(t) // 8}"
        product = f"{a}.astype({wide}) * {b}.astype({wide})"
    else:
        product = f"mul_hi({a}, {b})" if "hi" in i.parts else f"{a} * {b}"
    w.result(i.args[0], f"{product} + {w.value(i.args[3], t)}" if i.name == "mad" else product, t)


@emits("fma")
def _fma(w, i):
    t = i.types[-1]
    a, b, c = _sources(w, i, t, 3)
    if t == "f64":
        w.result(i.args[0], f"{a} * {b} + {c}", t)
    elif t in ("f16", "f16x2"):
        w.result(i.args[0], f"({a}.astype(f8) * {b} + {c}).astype(f2)", t)
    else:
        expression = f"fma32({a}, {b}, {c})"
        w.result(i.args[0], f"np.maximum({expression}, f4.type(0))" if "relu" in i.parts else expression, t)


@emits("min", "max")
def _extremum(w, i):
    t = i.types[-1]
    a, b = _sources(w, i, t)
    function = f"{i.name}imum" if t not in _FLOATS or "NaN" in i.parts else f"f{i.name}"
    w.result(i.args[0], f"np.{function}({a}, {b})", t)


@emits("div", "rem")
def _div(w, i):
    t = i.types[-1]
    a, b = _sources(w, i, t)
    expression = f"{a} / {b}" if t in _FLOATS else f"{i.name}_trunc({a}, {b})"
    w.result(i.args[0], expression, t)


@emits("and", "or", "xor")
def _logic(w, i):
    t = i.types[-1]
    a, b = _sources(w, i, t)
    w.result(i.args[0], f"{a} {dict(zip(('and', 'or', 'xor'), '&|^'))[i.name]} {b}", t)


@emits("not")
def _not(w, i):
    t = i.types[-1]
    w.result(i.args[0], f"~{w.value(i.args[1], t)}" if t != "pred" else f"np.logical_not({w.value(i.args[1], t)})", t)


@emits("shl", "shr")
def _shift(w, i):
    t = i.types[-1] if i.name == "shr" else _unsigned(i.types[-1])
    direction = "left" if i.name == "shl" else "right"
    if i.args[2].isdigit():
        a, amount = w.value(i.args[1], t), w.value(i.args[2], t)
        w.result(i.args[0], f"{a} {'<<' if i.name == 'shl' else '>>'} {amount}", t)
    else:
        w.result(i.args[0], f"shift_{direction}({w.value(i.args[1], t)}, {w.raw(i.args[2], 32)})", t)


@emits("shf")
def _funnel_shift(w, i):
    low, high, amount = (w.raw(a, 32) for a in i.args[1:4])
    w.result(i.args[0], f"funnel({low}, {high}, {amount}, {'l' in i.parts}, {'wrap' in i.parts})", "u32")


@emits("bfe")
def _extract(w, i):
    t = i.types[-1]
    position, length = (w.raw(a, 32) for a in i.args[2:4])
    if all(a.isdigit() for a in i.args[2:4]) and t[0] == "u" and int(i.args[2]) + int(i.args[3]) <= bits(t) and int(i.args[3]) < bits(t):
        mask = w.value(str((1 << int(i.args[3])) - 1), t)
        w.result(i.args[0], f"({w.value(i.args[1], t)} >> {w.value(i.args[2], t)}) & {mask}", t)
    else:
        w.result(i.args[0], f"extract({w.value(i.args[1], t)}, {position}, {length})", t)


@emits("bfi")
def _insert(w, i):
    width = bits(i.types[-1])
    a, b = (w.raw(x, width) for x in i.args[1:3])
    position, length = (w.raw(x, 32) for x in i.args[3:5])
    w.result(i.args[0], f"insert({a}, {b}, {position}, {length})", f"u{width}")


@emits("prmt")
def _permute(w, i):
    if len(i.parts) > 2:
        raise Unsupported(i, "only the default mode of prmt is modelled")
    a, b, selector = (w.raw(x, 32) for x in i.args[1:4])
    w.result(i.args[0], f"permute_bytes({a}, {b}, {selector})", "u32")


@emits("lop3")
def _lop3(w, i):
    a, b, c = (w.raw(x, 32) for x in i.args[1:4])
    w.result(i.args[0], f"lop3({a}, {b}, {c}, {int(i.args[4], 0)})", "u32")


@emits("popc", "clz", "brev")
def _bits(w, i):
    function = {"popc": "popcount", "clz": "leading_zeros", "brev": "reverse_bits"}[i.name]
    width = bits(i.types[-1])
    w.result(i.args[0], f"{function}({w.raw(i.args[1], width)})", f"u{width}" if i.name == "brev" else "u32")


@emits(*_UNARY)
def _unary(w, i):
    t = i.types[-1]
    w.result(i.args[0], _UNARY[i.name].format(w.value(i.args[1], t)), t)


@emits("copysign")
def _copysign(w, i):
    sign, magnitude = _sources(w, i, i.types[-1])
    w.result(i.args[0], f"np.copysign({magnitude}, {sign})", i.types[-1])


@emits("set")
def _set(w, i):
    to, t = i.types[:2]
    expression = _comparison(i, t, *(w.value(x, t) for x in i.args[1:3]))
    if len(i.args) > 3:
        raise Unsupported(i, "set with a third operand is not modelled")
    if to in _FLOATS:
        kind = {"f16x2": "f2", "f16": "f2"}.get(to, "f4")
        return w.result(i.args[0], f"({expression}).astype({kind})", to)
    w.result(i.args[0], f"where({expression}, u4.type(0xFFFFFFFF), u4.type(0))", "u32")


def _comparison(i, t, a, b):
    """Boolean expression of setp and set; unordered variants end in u."""
    compare = i.parts[1]
    if compare in ("num", "nan"):
        return f"{'~' if compare == 'num' else ''}(np.isnan({a}) | np.isnan({b}))"
    if compare not in _COMPARE:
        return f"(({a} {_COMPARE[compare[:-1]]} {b}) | ({a} != {a}) | ({b} != {b}))"
    if compare == "ne" and t in _FLOATS:
        # numpy's != is true for NaN, PTX's ne is not.
        return f"(({a} != {b}) & ({a} == {a}) & ({b} == {b}))"
    return f"({a} {_COMPARE[compare]} {b})"


@emits("setp")
def _setp(w, i):
    t = i.types[-1]
    expression = _comparison(i, t, *(w.value(x, t) for x in i.args[1:3]))
    first, *second = (d.strip() for d in i.args[0].split("|"))
    if t in ("f16x2", "bf16x2"):
        pair = w.temporary(expression)
        for d, half in zip((first, *second), "01"):
            w.result(d, f"{pair}[..., {half}]", "pred")
        return
    combine = {"and": "&", "or": "|", "xor": "^"}.get(i.parts[2])
    if len(i.args) > 3:
        extra = w.value(i.args[3], "pred")
        expression, inverse = f"{expression} {combine} {extra}", f"~{expression} {combine} {extra}"
    else:
        inverse = f"~{expression}"
    w.result(first, expression, "pred")
    for d in second:
        w.result(d, inverse, "pred")


@emits("selp")
def _select(w, i):
    t = i.types[-1]
    raw = t if t in ("f32", "f64") or all(w.storage.get(a) == "f4" for a in i.args[1:3]) else f"u{bits(t)}"
    raw = "f32" if raw not in ("f32", "f64") and raw == t.replace("b", "u") and w.storage.get(i.args[0]) == "f4" else raw
    a, b = (w.value(x, raw) for x in i.args[1:3])
    w.result(i.args[0], f"where({w.value(i.args[3], 'pred')}, {a}, {b})", raw)


@emits("mov")
def _mov(w, i):
    t = i.types[-1]
    destination, source = i.args
    if destination.startswith("{"):
        parts = unbrace(destination)
        width = bits(t) // len(parts)
        whole = w.raw(source, bits(t))
        for n, part in enumerate(parts):
            shifted = f"({whole} >> u{bits(t) // 8}.type({n * width}))" if n else whole
            w.result(part, f"{shifted}.astype(u{width // 8})", f"u{width}")
    elif source.startswith("{"):
        parts = unbrace(source)
        width, whole = bits(t) // len(parts), f"u{bits(t) // 8}"
        terms = [f"({w.raw(p, width)}.astype({whole}) << {whole}.type({n * width}))" for n, p in enumerate(parts)]
        w.result(destination, " | ".join(terms), f"u{bits(t)}")
    elif t == "pred":
        w.result(destination, w.value(source, "pred"), "pred")
    else:
        same = w.storage.get(destination) == "f4" and bits(t) == 32
        kind = "f32" if same else f"u{bits(t)}"
        w.result(destination, w.value(source, kind), kind)


@emits("cvta")
def _cvta(w, i):
    if "shared" in i.parts and "to" not in i.parts or "local" in i.parts:
        raise Unsupported(i, "generic addresses of shared and local memory are not modelled")
    w.result(i.args[0], w.raw(i.args[1], bits(i.types[-1])), f"u{bits(i.types[-1])}")


@emits("cvt")
def _cvt(w, i):
    to, *source = i.types
    source = source[0] if source else to
    if to in ("bf16x2", "f16x2", "e4m3x2", "e5m2x2"):
        return _cvt_pair(w, i, to, source)
    if source in ("e4m3x2", "e5m2x2"):
        raise Unsupported(i)
    value = w.value(i.args[1], source)
    if to == "tf32":
        return w.result(i.args[0], f"to_tf32({value}).view(u4)", "u32")
    if to in _FLOATS:
        computed = {"bf16": "f4", "f16": "f2", "f32": "f4", "f64": "f8"}[to]
        rounding = next((p for p in i.parts if p in ("rzi", "rni", "rmi", "rpi")), None)
        if rounding and source in _FLOATS:
            value = f"np.{dict(rzi='trunc', rni='rint', rmi='floor', rpi='ceil')[rounding]}({value})"
        expression = f"{value}.astype({computed})"
        if "sat" in i.parts:
            expression = f"np.clip({expression}, {computed}.type(0), {computed}.type(1))"
        return w.result(i.args[0], f"np.maximum({expression}, {computed}.type(0))" if "relu" in i.parts else expression, to)
    dtype = f"{'i' if to[0] == 's' else 'u'}{bits(to) // 8}"
    if source in _FLOATS:
        rounding = next(p for p in i.parts if p in ("rzi", "rni", "rmi", "rpi"))
        return w.result(i.args[0], f"float_to_int({value}, {rounding!r}, {dtype})", to)
    if "sat" in i.parts:
        raise Unsupported(i, "saturating integer conversions are not modelled")
    w.result(i.args[0], f"{value}.astype({dtype})", to)


def _cvt_pair(w, i, to, source):
    if source in ("e4m3x2", "e5m2x2"):
        pair = w.raw(i.args[1], 16)
        halves = ", ".join(f"FP8[{source[:4]!r}][({pair} >> {shift}) & 255].astype(f2)" for shift in (0, 8))
        return w.result(i.args[0], f"np.stack([{halves}], -1)", "f16x2")
    if to[:4] in FP8:
        if source != "f32":
            low, high = (f"{w.value(i.args[1], source)}[..., {k}]" for k in (0, 1))
        else:
            high, low = (w.value(a, "f32") for a in i.args[1:3])
        code = f"to_fp8({{}}, {to[:4]!r}).astype(u2)"
        return w.result(i.args[0], f"{code.format(low)} | ({code.format(high)} << 8)", "u16")
    high, low = (w.value(a, "f32") for a in i.args[1:3])
    encode = "to_bf16({})" if to == "bf16x2" else "({}).astype(f2).view(u2)"
    if "relu" in i.parts:
        high, low = (f"np.maximum({x}, f4.type(0))" for x in (high, low))
    w.result(i.args[0], f"{encode.format(low)}.astype(u4) | ({encode.format(high)}.astype(u4) << 16)", "u32")
