"""lora_shrink: rows into the rank space of their own adapters."""

import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels.reference.philox import keep_mask

from .registry import DTYPES, Case, Draw, Problem, Provider, Work, ours

STEP = 11
MIXED = dict(T=2048, D=1024, ranks=(4, 8, 8, 16, 16, 32, 64, 64), p=0.05)
EVEN = dict(T=512, D=512, ranks=(4, 8, 8, 16, 16, 32, 64, 64), p=0.0)
EXPERTS = dict(T=2048, D=1024, ranks=(16,) * 32, p=0.0)


def cases():
    return [
        Case("lora_shrink", "mixed", MIXED, "loop", ("quick", "full")),
        Case("lora_shrink", "32 adapters", EXPERTS, "loop", ("full",)),
        Case("lora_shrink", "even", EVEN, "loop", ("cost",), dtypes=("bf16",)),
    ]


def inputs(case, device):
    draw, s = Draw(case, device), case.shape
    leaves = {"x": draw.leaf(s["T"], s["D"]), **{f"A{i}": draw.leaf(r, s["D"], std=s["D"] ** -0.5) for i, r in enumerate(s["ranks"])}}
    return Problem(case, leaves, {"ids": draw.ints(len(s["ranks"]), s["T"])}, draw.normal(s["T"], max(s["ranks"])), ("x",))


def cost(case):
    s, width = case.shape, DTYPES[case.dtype].itemsize
    rows, factors = s["T"] * (s["D"] + max(s["ranks"])), s["D"] * sum(s["ranks"])
    flops = 2 * s["T"] * s["D"] * sum(s["ranks"]) / len(s["ranks"])
    # the backward reads x and ds, writes dx, and reads and writes the factors
    backward = rows + s["T"] * s["D"] + 2 * factors
    return {"fwd": Work((rows + factors) * width, flops, flops), "bwd": Work(backward * width, 2 * flops, 2 * flops)}


def saved_limit(case):
    return case.shape["T"] * case.shape["D"] * DTYPES[case.dtype].itemsize


def _A(problem):
    return [problem.leaves[f"A{i}"] for i in range(len(problem.case.shape["ranks"]))]


def run(problem, backend):
    A, ids, x = _A(problem), problem.fixed["ids"], problem.leaves["x"]
    bank = mtk.LoraBank.from_factors(A, [a.new_empty(1, len(a)) for a in A], 1.0, dropout=problem.case.shape["p"], seeds=list(range(len(A))))
    plan = mtk.group_plan(ids, len(A), step=STEP)
    fn = lambda: mtk.lora_shrink(x, bank, plan, training=problem.training, backend=backend)  # noqa: E731
    return problem.call(fn, given=(*plan.tensors(), *bank.tensors()))


def _loop(problem, drop):
    """One adapter after the other; drop(rows, adapter) applies dropout."""
    A, x, ids = _A(problem), problem.leaves["x"], problem.fixed["ids"]
    widest = max(len(a) for a in A)

    def fn():
        s = x.new_zeros(len(x), widest)
        for i, a in enumerate(A):
            rows = (ids == i).nonzero()[:, 0]
            s = s.index_add(0, rows, F.pad(drop(x[rows], i) @ a.T, (0, widest - len(a))))
        return s

    return problem.call(fn)


def plain(problem):
    threshold = round(problem.case.shape["p"] * 65536) if problem.training else 0

    def drop(rows, i):
        keep = keep_mask(len(rows), rows.shape[1], threshold, i, torch.tensor(STEP), 0, "cpu").to(rows.device)
        return rows * keep * (65536 / (65536 - threshold))

    return _loop(problem, drop)


PROVIDERS = (
    *ours(run),
    Provider("loop", lambda p: _loop(p, lambda rows, _: F.dropout(rows, p.case.shape["p"], p.training))),
)
