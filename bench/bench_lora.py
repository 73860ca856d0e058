"""lora: rows of many adapters with different ranks beside the same frozen linear layer."""

from functools import partial

import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels.testing import plain_lora

from . import peers
from .registry import DTYPES, Bar, Case, Draw, Problem, Provider, Work, ours

SCALE, STEP = 2.0, 11
MIXED = dict(T=2048, D=1024, O=1024, ranks=(4, 8, 8, 16, 16, 32, 64, 64), p=0.05)
MANY = dict(T=4096, D=1024, O=1024, ranks=tuple(8 + 8 * (i % 8) for i in range(64)), p=0.05)
DECODE = dict(T=32, D=1024, O=1024, ranks=(16,) * 32, p=0.0)
EVEN = dict(T=2048, D=1024, O=1024, ranks=(4, 8, 8, 16, 16, 32, 64, 64), p=0.0)
WIDE = {**EVEN, "ranks": (16, 32, 64, 16, 32, 64, 16, 32)}
SKEWED = {**EVEN, "shares": (0.05, 0.25, 0.008, 0.333, 0.1, 0.07, 0.16, 0.029)}
DELTA = {**EVEN, "T": 512, "D": 512, "O": 512}
BARS = {
    "fp32": (Bar("cpu", "base", 1.30),),
    "bf16": (Bar("cpu", "cpu fp32", 1.25, emulated=True), Bar("loop", "cpu", 4.0, at_least=True, emulated=True)),
}
ONE_THREAD = {"fp32": (Bar("loop", "cpu", 1.7, at_least=True, minima=True),)}


def cases():
    return [
        Case("lora_linear", "mixed", MIXED, "base", ("quick", "bars", "full"), bars=BARS),
        Case("lora_linear", "mixed, one thread", MIXED, "base", ("bars",), dtypes=("fp32",), threads=1, bars=ONE_THREAD),
        Case("lora_linear", "64 adapters", MANY, "base", ("full",)),
        Case("lora_linear", "decode", DECODE, "base", ("quick", "full"), modes=("fwd",), training=False),
        Case("lora_delta", "mixed", MIXED, "loop", ("full",)),
        Case("lora_linear", "even", EVEN, "base", ("cost",), dtypes=("bf16",)),
        Case("lora_linear", "even, 16 to 64", WIDE, "base", ("cost",), dtypes=("bf16",)),
        Case("lora_linear", "skewed", SKEWED, "base", ("cost",), dtypes=("bf16",)),
        Case("lora_delta", "even", DELTA, "loop", ("cost",), dtypes=("bf16",)),
    ]


def rows_of(shape):
    """Rows of each adapter: even, or by `shares` of the T rows, which add up to 1."""
    n = len(shape["ranks"])
    shares = shape.get("shares", (1 / n,) * n)
    if len(shares) != n or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares {shares} of {n} adapters; give one for each, adding up to 1")
    ends = [round(sum(shares[: i + 1]) * shape["T"]) for i in range(n)]
    return [end - begin for begin, end in zip([0, *ends], ends)]


def inputs(case, device):
    draw, s = Draw(case, device), case.shape
    leaves = {"x": draw.leaf(s["T"], s["D"])}
    for i, r in enumerate(s["ranks"]):
        leaves[f"A{i}"], leaves[f"B{i}"] = draw.leaf(r, s["D"], std=s["D"] ** -0.5), draw.leaf(s["O"], r, std=r**-0.5)
    fixed = {"weight": draw.normal(s["O"], s["D"], std=s["D"] ** -0.5), "ids": draw.shuffled(rows_of(s))}
    return Problem(case, leaves, fixed, draw.normal(s["T"], s["O"]), ("x",), case.training)


def cost(case):
    """split_bytes: shrink and expand apart from each other, the frozen layer's product fused with one of them."""
    s, width = case.shape, DTYPES[case.dtype].itemsize
    T, D, O, ranks = s["T"], s["D"], s["O"], s["ranks"]
    weight, factors = D * O * _linear(case), (D + O) * sum(ranks)
    base, lora = 2 * T * weight, 2 * (D + O) * sum(n * r for n, r in zip(rows_of(s), ranks))
    # the backward reads x and dy, writes dx, and reads and writes the factors
    forward, backward = T * (D + O) + weight + factors, T * (2 * D + O) + weight + 2 * factors
    split = (2 * T * D + T * O + weight, 2 * T * (D + O) + weight) if weight else (None, None)
    split = [n and n * width for n in split]
    fwd = Work(forward * width, base + lora, lora, base, split[0])
    return {"fwd": fwd, "bwd": Work(backward * width, base + 2 * lora, 2 * lora, base, split[1])}


def saved_limit(case):
    return case.shape["T"] * (case.shape["D"] + max(case.shape["ranks"])) * DTYPES[case.dtype].itemsize


def _factors(problem):
    n = len(problem.case.shape["ranks"])
    return [problem.leaves[f"A{i}"] for i in range(n)], [problem.leaves[f"B{i}"] for i in range(n)]


def _bank(problem):
    A, B = _factors(problem)
    return mtk.LoraBank.from_factors(A, B, SCALE, dropout=problem.case.shape["p"], seeds=list(range(len(A))))


def _base(problem):
    if problem.case.op == "lora_delta":
        return problem.leaves["x"].new_zeros(problem.case.shape["T"], problem.case.shape["O"])
    return F.linear(problem.leaves["x"], problem.fixed["weight"])


def _plan(problem):
    return mtk.group_plan(problem.fixed["ids"], len(problem.case.shape["ranks"]), step=STEP)


def run(problem, backend):
    bank, x, weight = _bank(problem), problem.leaves["x"], problem.fixed["weight"]
    plan, options = _plan(problem), dict(training=problem.training, backend=backend)

    def fn():
        if problem.case.op == "lora_delta":
            return mtk.lora_delta(x, bank, plan, **options)
        return mtk.lora_linear(x, weight, None, bank, plan, **options)

    return problem.call(fn, given=(*plan.tensors(), *bank.tensors()))


def plain(problem):
    bank, x, ids = _bank(problem), problem.leaves["x"], problem.fixed["ids"]
    if not problem.training:
        bank.threshold = torch.zeros_like(bank.threshold)
    return problem.call(lambda: plain_lora(x, _base(problem), bank, ids, STEP, 0))


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
    Provider("base", lambda p: p.call(partial(_base, p), {"x": p.leaves["x"]}), "part", applies=_linear),
    *ours(run),
    Provider("cpu fp32", lambda p: run(p.to(torch.float32), "cpu"), "part", slow=True, applies=lambda case: "bf16" in case.bars and case.dtype != "fp32"),
    Provider("plan", lambda p: p.call(partial(_plan, p), {}), "part"),
    Provider("loop", lambda p: peers.lora_loop(p, partial(_base, p), *_factors(p), SCALE)),
    Provider("padded", lambda p: peers.lora_padded(p, partial(_base, p), *_factors(p), SCALE, _plan(p))),
    Provider("peft", lambda p: peers.lora_peft(p, *_factors(p), SCALE), applies=_linear),
    Provider("lorafusion", partial(_engine, "lorafusion"), applies=lambda case: _linear(case) and case.training and _narrow(case)),
    Provider("sglang", partial(_engine, "sglang"), applies=_narrow),
    Provider("vllm", partial(_engine, "vllm"), applies=_narrow),
)
