"""dora: row norms of adapted weights, and layers whose rows each have a DoRA adapter of their own."""

import torch
import torch.nn.functional as F

import mtkernels as mtk

from .registry import DTYPES, Case, Draw, Problem, Provider, Work, ours

SCALE = 2.0
MIXED = dict(T=2048, D=1024, O=1024, ranks=(4, 8, 8, 16, 16, 32, 64, 64))
EVEN = {**MIXED, "T": 512, "D": 512, "O": 512}


def cases():
    return [
        Case("dora_linear", "mixed", MIXED, "loop", ("quick", "full")),
        Case("dora_linear", "even", EVEN, "loop", ("cost",), dtypes=("bf16",)),
        Case("dora_norm", "mixed", {**MIXED, "T": 0}, "loop", ("quick", "full"), modes=("fwd",), training=False),
    ]


def inputs(case, device):
    draw, s = Draw(case, device), case.shape
    leaves = {"x": draw.leaf(s["T"], s["D"])} if s["T"] else {}
    for i, r in enumerate(s["ranks"]):
        leaves[f"A{i}"], leaves[f"B{i}"] = draw.leaf(r, s["D"], std=s["D"] ** -0.5), draw.leaf(s["O"], r, std=r**-0.5)
        leaves[f"m{i}"] = draw.leaf(s["O"])
    fixed = {"weight": draw.normal(s["O"], s["D"], std=s["D"] ** -0.5), "ids": draw.ints(len(s["ranks"]), s["T"])}
    return Problem(case, leaves, fixed, draw.normal(s["T"], s["O"]), ("x",))


def cost(case):
    """W once for the norms and once for the product; the norms of n adapters are 2 (R + 1) flops per element of W."""
    s, width = case.shape, DTYPES[case.dtype].itemsize
    weight, factors = s["D"] * s["O"], (s["D"] + s["O"]) * sum(s["ranks"])
    norm = Work((weight + factors) * width + 4 * len(s["ranks"]) * s["O"], 2 * weight * (sum(s["ranks"]) + len(s["ranks"])), 2 * weight * sum(s["ranks"]))
    if case.op == "dora_norm":
        return {"fwd": norm, "bwd": Work(0, 0)}
    base, lora = 2 * s["T"] * weight, 2 * s["T"] * sum(s["ranks"]) / len(s["ranks"]) * (s["D"] + s["O"])
    forward, backward = s["T"] * (s["D"] + 3 * s["O"]) + weight + factors, s["T"] * (2 * s["D"] + 5 * s["O"]) + weight + 2 * factors
    bwd = Work(backward * width, base + 2 * lora, 2 * lora, base)
    return {"fwd": norm + Work(forward * width, base + lora, lora, base), "bwd": bwd}


def saved_limit(case):
    s = case.shape
    rows = s["T"] * (s["D"] + s["O"] + max(s["ranks"])) * DTYPES[case.dtype].itemsize
    return rows + 8 * len(s["ranks"]) * s["O"]


def _tensors(problem):
    n = len(problem.case.shape["ranks"])
    return [[problem.leaves[f"{name}{i}"] for i in range(n)] for name in "ABm"]


def run(problem, backend):
    A, B, magnitudes = _tensors(problem)
    bank, weight = mtk.LoraBank.from_factors(A, B, SCALE), problem.fixed["weight"]
    if problem.case.op == "dora_norm":
        return problem.call(lambda: mtk.dora_norm(weight, bank, backend=backend), given=bank.tensors())
    plan = mtk.group_plan(problem.fixed["ids"], len(bank), step=0)
    given = *plan.tensors(), *bank.tensors()
    return problem.call(lambda: mtk.dora_linear(problem.leaves["x"], weight, None, bank, magnitudes, plan, backend=backend), given=given)


def _norm(weight, a, b):
    return torch.linalg.norm(weight + SCALE * (b.detach() @ a.detach()), dim=1)


def plain(problem):
    """PEFT's formula on each adapter's own rows: W + s B A is made for every adapter and every step."""
    (A, B, magnitudes), weight, ids = _tensors(problem), problem.fixed["weight"], problem.fixed["ids"]

    def fn():
        if problem.case.op == "dora_norm":
            return torch.stack([_norm(weight, a, b) for a, b in zip(A, B)])
        y = base = F.linear(problem.leaves["x"], weight)
        for i, (a, b, m) in enumerate(zip(A, B, magnitudes)):
            rows = (ids == i).nonzero()[:, 0]
            scale = m / _norm(weight, a, b)
            y = y.index_add(0, rows, (scale - 1) * base[rows] + scale * (problem.leaves["x"][rows] @ a.T @ b.T) * SCALE)
        return y

    return problem.call(fn)


PROVIDERS = (
    Provider(
        "base",
        lambda p: p.call(lambda: F.linear(p.leaves["x"], p.fixed["weight"]), {"x": p.leaves["x"]}),
        "part",
        applies=lambda case: case.op == "dora_linear",
    ),
    *ours(run),
    Provider("loop", plain),
)
