"""rmsnorm_lora_shrink: a norm and the adapters of the layer behind it, whose base is the identity: y = xn + LoRA(xn)."""

from functools import partial

import torch

import mtkernels as mtk
from mtkernels.testing import plain_lora, plain_rmsnorm

from . import peers
from .registry import DTYPES, Case, Draw, Problem, Provider, Work, ours

SCALE, STEP, EPS = 2.0, 11, 1e-5
MIXED = dict(T=2048, D=1024, ranks=(4, 8, 8, 16, 16, 32, 64, 64), p=0.05)
EVEN = {**MIXED, "T": 512, "D": 512, "p": 0.0}
WIDE = dict(T=2048, D=4096, ranks=(16,) * 8, p=0.05)


def cases():
    return [
        Case("rmsnorm_lora_shrink", "mixed", MIXED, "separate", ("quick", "full")),
        Case("rmsnorm_lora_shrink", "even", EVEN, "separate", ("cost",), dtypes=("bf16",)),
        Case("rmsnorm_lora_shrink", "wide", WIDE, "separate", ("full",)),
    ]


def inputs(case, device):
    draw, s = Draw(case, device), case.shape
    leaves = {"x": draw.leaf(s["T"], s["D"]), "gamma": draw.leaf(s["D"])}
    for i, r in enumerate(s["ranks"]):
        leaves[f"A{i}"], leaves[f"B{i}"] = draw.leaf(r, s["D"], std=s["D"] ** -0.5), draw.leaf(s["D"], r, std=r**-0.5)
    return Problem(case, leaves, {"ids": draw.ints(len(s["ranks"]), s["T"])}, draw.normal(s["T"], s["D"]), ("x",))


def cost(case):
    s, width = case.shape, DTYPES[case.dtype].itemsize
    rows, factors = s["T"] * s["D"], 2 * s["D"] * sum(s["ranks"])
    flops = 4 * s["T"] * s["D"] * sum(s["ranks"]) / len(s["ranks"])
    # x, xn, y; then dy, x twice, dxn, dx
    forward, backward = 3 * rows + factors, 5 * rows + 2 * factors
    return {"fwd": Work(forward * width, flops, flops), "bwd": Work(backward * width, 2 * flops, 2 * flops)}


def saved_limit(case):
    s = case.shape
    return s["T"] * ((s["D"] + max(s["ranks"])) * DTYPES[case.dtype].itemsize + 4)


def _bank(problem):
    s = problem.case.shape
    A, B = ([problem.leaves[f"{side}{i}"] for i in range(len(s["ranks"]))] for side in "AB")
    return mtk.LoraBank.from_factors(A, B, SCALE, dropout=s["p"], seeds=list(range(len(A))))


def _plan(problem):
    return mtk.group_plan(problem.fixed["ids"], len(problem.case.shape["ranks"]), step=STEP)


def run(problem, backend):
    bank, plan, x, gamma = _bank(problem), _plan(problem), problem.leaves["x"], problem.leaves["gamma"]

    def fn():
        xn, s = mtk.rmsnorm_lora_shrink(x, gamma, EPS, bank, plan, training=problem.training, backend=backend)
        return mtk.lora_expand(s, bank, plan, xn, backend=backend)

    return problem.call(fn, given=(*plan.tensors(), *bank.tensors()))


def _separate(norm, problem):
    """A norm, then lora_delta, which reads its result again."""
    bank, plan, x, gamma = _bank(problem), _plan(problem), problem.leaves["x"], problem.leaves["gamma"]
    norm = norm(x.device.type)

    def fn():
        xn = norm(x, gamma)
        return mtk.lora_delta(xn, bank, plan, xn, training=problem.training)

    return problem.call(fn, given=(*plan.tensors(), *bank.tensors()))


def plain(problem):
    bank, x, gamma, ids = _bank(problem), problem.leaves["x"], problem.leaves["gamma"], problem.fixed["ids"]
    if not problem.training:
        bank.threshold = torch.zeros_like(bank.threshold)

    def fn():
        xn = plain_rmsnorm(x, gamma, EPS)
        return plain_lora(xn, xn, bank, ids, STEP, 0)

    return problem.call(fn)


PROVIDERS = (
    *ours(run),
    Provider("separate", partial(_separate, lambda device: lambda x, gamma: plain_rmsnorm(x, gamma, EPS))),
    Provider("loop", plain),
    Provider("liger", partial(_separate, partial(peers.liger_rmsnorm, eps=EPS))),
)
