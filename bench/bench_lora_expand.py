"""lora_expand: out of rank space, beside a base output."""

import torch

import mtkernels as mtk

from .registry import DTYPES, Case, Draw, Problem, Provider, Work, ours

SCALE = 2.0
MIXED = dict(T=2048, O=1024, ranks=(4, 8, 8, 16, 16, 32, 64, 64), K=1)
EVEN = dict(T=512, O=512, ranks=(4, 8, 8, 16, 16, 32, 64, 64), K=1)
GATED = dict(T=2048, O=1024, ranks=(16,) * 8, K=2)


def cases():
    return [
        Case("lora_expand", "mixed", MIXED, "loop", ("quick", "full")),
        Case("lora_expand", "two gated adapters a row", GATED, "loop", ("full",)),
        Case("lora_expand", "even", EVEN, "loop", ("cost",), dtypes=("bf16",)),
    ]


def inputs(case, device):
    draw, s = Draw(case, device), case.shape
    leaves = {"s": draw.leaf(s["T"], s["K"], max(s["ranks"])), "out": draw.leaf(s["T"], s["O"]), "gates": draw.leaf(s["T"], s["K"], dtype=torch.float32)}
    leaves |= {f"B{i}": draw.leaf(s["O"], r, std=r**-0.5) for i, r in enumerate(s["ranks"])}
    return Problem(case, leaves, {"ids": draw.ints(len(s["ranks"]), s["T"], s["K"])}, draw.normal(s["T"], s["O"]), ("s",))


def cost(case):
    s, width = case.shape, DTYPES[case.dtype].itemsize
    rank_space, factors, out = s["T"] * s["K"] * max(s["ranks"]), s["O"] * sum(s["ranks"]), s["T"] * s["O"]
    flops = 2 * s["T"] * s["K"] * s["O"] * sum(s["ranks"]) / len(s["ranks"])
    backward = 2 * (rank_space + factors) + out
    return {"fwd": Work((rank_space + factors + 2 * out) * width, flops, flops), "bwd": Work(backward * width, 2 * flops, 2 * flops)}


def saved_limit(case):
    s = case.shape
    return s["T"] * s["K"] * (max(s["ranks"]) * DTYPES[case.dtype].itemsize + 4)


def _B(problem):
    return [problem.leaves[f"B{i}"] for i in range(len(problem.case.shape["ranks"]))]


def run(problem, backend):
    B, t = _B(problem), problem.leaves
    bank = mtk.LoraBank.from_factors([b.new_empty(b.shape[1], 1) for b in B], B, SCALE, seeds=[0] * len(B))
    plan = mtk.group_plan(problem.fixed["ids"], len(B), step=0)
    fn = lambda: mtk.lora_expand(t["s"], bank, plan, t["out"], gates=t["gates"], backend=backend)  # noqa: E731
    return problem.call(fn, given=(*plan.tensors(), *bank.tensors()))


def plain(problem):
    """One adapter after the other."""
    B, t, ids = _B(problem), problem.leaves, problem.fixed["ids"]

    def fn():
        y = t["out"]
        for i, b in enumerate(B):
            rows, slots = (ids == i).nonzero(as_tuple=True)
            delta = t["s"][rows, slots, : b.shape[1]] @ b.T * (SCALE * t["gates"][rows, slots, None])
            y = y.index_add(0, rows, delta.to(y.dtype))
        return y

    return problem.call(fn)


PROVIDERS = (*ours(run), Provider("loop", plain))
