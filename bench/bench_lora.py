"""lora: rows of many adapters with different ranks beside the same frozen linear layer, or beside several that share x."""

from functools import partial

import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels import _native
from mtkernels.testing import plain_lora

from . import peers
from .registry import DTYPES, Bar, Case, Draw, Problem, Provider, Work, ours

SCALE, STEP = 2.0, 11
MIXED = dict(T=2048, D=1024, O=1024, ranks=(4, 8, 8, 16, 16, 32, 64, 64), p=0.05)
MANY = dict(T=4096, D=1024, O=1024, ranks=tuple(8 + 8 * (i % 8) for i in range(64)), p=0.05)
DECODE = dict(T=32, D=1024, O=1024, ranks=(16,) * 32, p=0.0)
# Several targets: a width and a rank each; `adapters` of them.
QKV = dict(T=2048, D=1024, O=(1024, 256, 256), ranks=(16, 8, 8), adapters=8, p=0.05)
EQUAL = {**QKV, "O": (1024, 1024, 1024)}
EVEN = dict(T=2048, D=1024, O=1024, ranks=(4, 8, 8, 16, 16, 32, 64, 64), p=0.0)
WIDE = {**EVEN, "ranks": (16, 32, 64, 16, 32, 64, 16, 32)}
SKEWED = {**EVEN, "shares": (0.05, 0.25, 0.008, 0.333, 0.1, 0.07, 0.16, 0.029)}
DROPPED = {**EVEN, "p": 0.05}
KEPT = {**DROPPED, "dropout_mode": "bitmask"}
# The jit function of triton_kernels/lora_base.py that multiplies by the frozen weight.
BASE_DOT = "base_dot"
DELTA = {**EVEN, "T": 512, "D": 512, "O": 512}
BARS = {
    "fp32": (Bar("cpu", "base", 1.20),),
    "bf16": (Bar("cpu", "cpu fp32", 1.15, emulated=True), Bar("loop", "cpu", 4.0, at_least=True, emulated=True)),
}
ONE_THREAD = {"fp32": (Bar("loop", "cpu", 1.7, at_least=True, minima=True),)}
GROUP = {dtype: (Bar("cpu", "one by one", 0.7, above="own base"),) for dtype in ("fp32", "bf16")}


def cases():
    return [
        Case("lora_linear", "mixed", MIXED, "base", ("quick", "bars", "full"), bars=BARS),
        Case("lora_linear", "mixed, one thread", MIXED, "base", ("bars",), dtypes=("fp32",), threads=1, bars=ONE_THREAD),
        Case("lora_linear", "mixed, no dropout", {**MIXED, "p": 0.0}, "base", ("bars", "full")),
        Case("lora_linear", "64 adapters", MANY, "base", ("bars", "full"), bars={"fp32": (Bar("cpu", "base", 1.30),)}),
        Case("lora_linear", "decode", DECODE, "base", ("quick", "bars", "full"), bars={"fp32": (Bar("cpu", "base", 2.5),)}),
        Case("lora_linear_group", "qkv", QKV, "base", ("quick", "bars", "full"), bars=GROUP),
        Case("lora_linear_group", "qkv, equal widths", EQUAL, "base", ("bars", "full")),
        Case("lora_delta", "mixed", MIXED, "loop", ("full",)),
        Case("lora_linear", "even", EVEN, "base", ("cost",), dtypes=("bf16",)),
        Case("lora_linear", "even, 16 to 64", WIDE, "base", ("cost",), dtypes=("bf16",)),
        Case("lora_linear", "even, dropout", DROPPED, "base", ("cost",), dtypes=("bf16",)),
        Case("lora_linear", "even, keep bits", KEPT, "base", ("cost",), dtypes=("bf16",)),
        Case("lora_linear", "skewed", SKEWED, "base", ("cost",), dtypes=("bf16",)),
        Case("lora_delta", "even", DELTA, "loop", ("cost",), dtypes=("bf16",)),
    ]


def _targets(shape):
    """(width, rank of every adapter) of each target."""
    if isinstance(shape["O"], int):
        return [(shape["O"], shape["ranks"])]
    return [(O, (rank,) * shape["adapters"]) for O, rank in zip(shape["O"], shape["ranks"])]


def _n_adapters(shape):
    return shape.get("adapters", len(shape["ranks"]))


def rows_of(shape):
    """Rows of each adapter: even, or by `shares` of the T rows, which add up to 1."""
    n = _n_adapters(shape)
    shares = shape.get("shares", (1 / n,) * n)
    if len(shares) != n or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares {shares} of {n} adapters; give one for each, adding up to 1")
    ends = [round(sum(shares[: i + 1]) * shape["T"]) for i in range(n)]
    return [end - begin for begin, end in zip([0, *ends], ends)]


def inputs(case, device):
    draw, s, fixed = Draw(case, device), case.shape, {}
    leaves = {"x": draw.leaf(s["T"], s["D"])}
    for g, (O, ranks) in enumerate(_targets(s)):
        for i, r in enumerate(ranks):
            leaves[f"A{g}.{i}"], leaves[f"B{g}.{i}"] = draw.leaf(r, s["D"], std=s["D"] ** -0.5), draw.leaf(O, r, std=r**-0.5)
        fixed[f"weight {g}"] = draw.normal(O, s["D"], std=s["D"] ** -0.5)
    fixed["ids"] = draw.shuffled(rows_of(s))
    upstream = tuple(draw.normal(s["T"], O) for O, _ in _targets(s))
    return Problem(case, leaves, fixed, upstream if _group(case) else upstream[0], ("x",), case.training)


def cost(case):
    """split_bytes: shrink and expand apart from each other, the frozen layer's product fused with one of them."""
    s, width = case.shape, DTYPES[case.dtype].itemsize
    T, D, targets = s["T"], s["D"], _targets(s)
    weight = D * sum(O for O, _ in targets) * (case.op != "lora_delta")
    bits = _kept_bytes(s)  # written by the forward, read for dA and again for dx
    outs, factors = T * sum(O for O, _ in targets), sum((D + O) * sum(ranks) for O, ranks in targets)
    base = 2 * T * weight
    lora = sum(2 * (D + O) * sum(n * r for n, r in zip(rows_of(s), ranks)) for O, ranks in targets)
    # the backward reads x and dy, writes dx, and reads and writes the factors
    forward, backward = T * D + outs + weight + factors, 2 * T * D + outs + weight + 2 * factors
    split = (2 * T * D + outs + weight, 2 * T * D + 2 * outs + weight) if weight else (None, None)
    split = [n and n * width + reads * bits for n, reads in zip(split, (1, 2))]
    fwd = Work(forward * width + bits, base + lora, lora, base, split[0], BASE_DOT)
    return {"fwd": fwd, "bwd": Work(backward * width + bits, base + 2 * lora, 2 * lora, base, split[1], BASE_DOT)}


def _kept_bytes(shape):
    return shape["T"] * -(-shape["D"] // 8) * len(_targets(shape)) * (shape.get("dropout_mode") == "bitmask")


def saved_limit(case):
    s, per_row = case.shape, case.shape["D"] + sum(max(ranks) for _, ranks in _targets(case.shape))
    return s["T"] * per_row * DTYPES[case.dtype].itemsize + _kept_bytes(s)


def peak_limit(case):
    """Outputs, gradients and rank space (S, and dS in parts, float32), but no float32 copy of x, W or y beside them.

    Where the CPU multiplies 16-bit numbers itself the base is torch's, and oneDNN holds a product of few rows in float32 for a moment.
    """
    s, targets = case.shape, _targets(case.shape)
    results = s["T"] * (s["D"] + sum(O for O, _ in targets)) + sum((s["D"] + O) * sum(ranks) for O, ranks in targets)
    rank_space = 8 * s["T"] * sum(max(ranks) + 32 for _, ranks in targets)
    copies = [s["T"] * s["D"], *(n * O for O, _ in targets for n in (s["T"], s["D"]))]
    torch_base = case.dtype != "fp32" and _native.available() and _native.fast_matmul(DTYPES[case.dtype])
    product = s["T"] * max(s["D"], *(O for O, _ in targets)) if torch_base and s["T"] <= 64 else 0
    return results * DTYPES[case.dtype].itemsize + 4 * (rank_space + min(copies) // 2 + product)


def _weights(problem):
    return [t for name, t in problem.fixed.items() if name.startswith("weight")]


def _factors(problem, g=0):
    n = _n_adapters(problem.case.shape)
    return [problem.leaves[f"A{g}.{i}"] for i in range(n)], [problem.leaves[f"B{g}.{i}"] for i in range(n)]


def _banks(problem):
    made = []
    for g in range(len(_weights(problem))):
        A, B = _factors(problem, g)
        made.append(mtk.LoraBank.from_factors(A, B, SCALE, dropout=problem.case.shape["p"], seeds=list(range(len(A)))))
    return made


def _base(problem):
    x = problem.leaves["x"]
    if problem.case.op == "lora_delta":
        return x.new_zeros(problem.case.shape["T"], problem.case.shape["O"])
    ys = tuple(F.linear(x, weight) for weight in _weights(problem))
    return ys if _group(problem.case) else ys[0]


class _OwnLinear(torch.autograd.Function):
    """x W^T by the kernel lora_linear takes for it on this CPU."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight, ctx.own = weight, _native.available() and x.device.type == "cpu" and not _native.fast_matmul(x.dtype)
        return _native.ops().lora_base_linear(x, weight, None) if ctx.own else F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        return _native.ops().lora_base_dx([dy], [ctx.weight]) if ctx.own else dy @ ctx.weight, None


def _own_base(problem):
    return problem.call(lambda: tuple(_OwnLinear.apply(problem.leaves["x"], w) for w in _weights(problem)), {"x": problem.leaves["x"]})


def _plan(problem):
    return mtk.group_plan(problem.fixed["ids"], _n_adapters(problem.case.shape), step=STEP)


def run(problem, backend):
    banks, x, weights = _banks(problem), problem.leaves["x"], _weights(problem)
    mode = problem.case.shape.get("dropout_mode", "replay")
    plan, options = _plan(problem), dict(training=problem.training, dropout_mode=mode, backend=backend)

    def fn():
        if problem.case.op == "lora_delta":
            return mtk.lora_delta(x, banks[0], plan, **options)
        if _group(problem.case):
            return mtk.lora_linear_group(x, weights, None, banks, plan, **options)
        return mtk.lora_linear(x, weights[0], None, banks[0], plan, **options)

    return problem.call(fn, given=(*plan.tensors(), *(t for bank in banks for t in bank.tensors())))


def _one_by_one(problem):
    banks, x, weights, plan = _banks(problem), problem.leaves["x"], _weights(problem), _plan(problem)
    options = dict(training=problem.training, backend="cpu")
    return problem.call(lambda: tuple(mtk.lora_linear(x, w, None, bank, plan, site=g, **options) for g, (w, bank) in enumerate(zip(weights, banks))))


def plain(problem):
    banks, x, ids = _banks(problem), problem.leaves["x"], problem.fixed["ids"]
    if not problem.training:
        for bank in banks:
            bank.threshold = torch.zeros_like(bank.threshold)

    def fn():
        if not _group(problem.case):
            return plain_lora(x, _base(problem), banks[0], ids, STEP, 0)
        return tuple(plain_lora(x, y, bank, ids, STEP, g) for g, (y, bank) in enumerate(zip(_base(problem), banks)))

    return problem.call(fn)


def _group(case):
    return case.op == "lora_linear_group"


def _alone(case):
    return not _group(case)


def _engine(name, problem):
    peers.require("triton")
    from . import lora_engines

    base = () if name == "lorafusion" else (partial(_base, problem),)
    return getattr(lora_engines, name)(problem, *base, *_factors(problem), SCALE, _plan(problem))


def _narrow(case):
    return case.dtype != "fp32"


def _linear(case):
    return case.op == "lora_linear"


PROVIDERS = (
    Provider("base", lambda p: p.call(partial(_base, p), {"x": p.leaves["x"]}), "part", applies=lambda case: case.op != "lora_delta"),
    Provider("own base", _own_base, "part", applies=_group),
    *ours(run),
    Provider("one by one", _one_by_one, "part", applies=lambda case: _group(case) and _native.available()),
    Provider("cpu fp32", lambda p: run(p.to(torch.float32), "cpu"), "part", slow=True, applies=lambda case: _linear(case) and "bf16" in case.bars and case.dtype != "fp32"),
    Provider("plan", lambda p: p.call(partial(_plan, p), {}), "part"),
    Provider("loop", lambda p: peers.lora_loop(p, partial(_base, p), *_factors(p), SCALE), applies=_alone),
    Provider("padded", lambda p: peers.lora_padded(p, partial(_base, p), *_factors(p), SCALE, _plan(p)), applies=_alone),
    Provider("peft", lambda p: peers.lora_peft(p, *_factors(p), SCALE), applies=_linear),
    Provider("lorafusion", partial(_engine, "lorafusion"), applies=lambda case: _linear(case) and case.training and _narrow(case)),
    Provider("sglang", partial(_engine, "sglang"), applies=_narrow),
    Provider("vllm", partial(_engine, "vllm"), applies=_narrow),
)
