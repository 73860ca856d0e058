"""lora: rows of many adapters with different ranks beside the same frozen linear layer."""

from functools import partial

import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels.testing import plain_lora

from . import peers
from .registry import DTYPES, Bar, Case, Draw, Problem, Provider, ours

SCALE, STEP = 2.0, 11
MIXED = dict(T=2048, D=1024, O=1024, ranks=(4, 8, 8, 16, 16, 32, 64, 64), p=0.05)
MANY = dict(T=4096, D=1024, O=1024, ranks=tuple(8 + 8 * (i % 8) for i in range(64)), p=0.05)
DECODE = dict(T=32, D=1024, O=1024, ranks=(16,) * 32, p=0.0)
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
    ]


def inputs(case, device):
    draw, s = Draw(case, device), case.shape
    leaves = {"x": draw.leaf(s["T"], s["D"])}
    for i, r in enumerate(s["ranks"]):
        leaves[f"A{i}"], leaves[f"B{i}"] = draw.leaf(r, s["D"], std=s["D"] ** -0.5), draw.leaf(s["O"], r, std=r**-0.5)
    fixed = {"weight": draw.normal(s["O"], s["D"], std=s["D"] ** -0.5), "ids": draw.ints(len(s["ranks"]), s["T"])}
    return Problem(case, leaves, fixed, draw.normal(s["T"], s["O"]), ("x",), case.training)


def cost(case, mode):
    s, width = case.shape, DTYPES[case.dtype].itemsize
    base = 2 * s["T"] * s["D"] * s["O"] * (case.op == "lora_linear")
    lora = 2 * s["T"] * sum(s["ranks"]) / len(s["ranks"]) * (s["D"] + s["O"])
    rows, factors = s["T"] * (s["D"] + s["O"]), (s["D"] + s["O"]) * sum(s["ranks"]) + s["D"] * s["O"]
    forward, backward = rows + factors, 2 * rows + 2 * factors
    n_bytes, flops = {"fwd": (forward, base + lora), "bwd": (backward, base + 2 * lora), "full": (forward + backward, 2 * base + 3 * lora)}[mode]
    return n_bytes * width, flops


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
)
