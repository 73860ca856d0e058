"""moe_lora_linear: experts with adapters of several ranks, the rows of a batch routed to K experts each and mixed over the adapters."""

from functools import partial

import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels.testing import plain_moe_lora

from .registry import DTYPES, Bar, Case, Draw, Problem, Provider, Work, ours

SCALE, STEP = 2.0, 11
# Rows shared by their experts, each result kept; or a row for each expert, results weighted and summed.
UP = dict(T=1024, K=2, E=8, D=512, O=1024, ranks=(8, 16, 16, 32), p=0.05)
DOWN = {**UP, "D": 1024, "O": 512, "gated": True}
MANY = dict(T=2048, K=8, E=64, D=256, O=512, ranks=(8, 16), p=0.05)
SMALL = dict(T=256, K=2, E=4, D=256, O=256, ranks=(8, 16), p=0.0)
# The jit function of triton_kernels/lora_base.py that multiplies by the frozen weights.
BASE_DOT = "base_dot"
BARS = {"fp32": (Bar("loop", "cpu", 1.0, at_least=True),), "bf16": (Bar("loop", "cpu", 1.0, at_least=True, emulated=True),)}


def cases():
    return [
        Case("moe_lora_linear", "up", UP, "loop", ("quick", "bars", "full"), threads=1, bars=BARS),
        Case("moe_lora_linear", "down, gates", DOWN, "loop", ("bars", "full"), threads=1, bars=BARS),
        Case("moe_lora_linear", "64 experts", MANY, "loop", ("bars", "full"), threads=1, bars=BARS),
        Case("moe_lora_linear", "small", SMALL, "loop", ("cost",), dtypes=("bf16",)),
        Case("moe_lora_linear", "small, gates", {**SMALL, "gated": True}, "loop", ("cost",), dtypes=("bf16",)),
    ]


def inputs(case, device):
    draw, s = Draw(case, device), case.shape
    leaves = {"x": draw.leaf(s["T"], *[s["K"]] * bool(s.get("gated")), s["D"])}
    if s.get("gated"):
        leaves["gates"] = draw.leaf(s["T"], s["K"], dtype=torch.float32)
    for e in range(s["E"]):
        for a, r in enumerate(s["ranks"]):
            leaves[f"A{e}.{a}"], leaves[f"B{e}.{a}"] = draw.leaf(r, s["D"], std=s["D"] ** -0.5), draw.leaf(s["O"], r, std=r**-0.5)
    scores = torch.randn(s["T"], s["E"], generator=draw.generator)
    fixed = {"weight": draw.normal(s["E"], s["O"], s["D"], std=s["D"] ** -0.5), "experts": scores.topk(s["K"]).indices.to(device)}
    fixed["adapters"] = draw.ints(len(s["ranks"]), s["T"])
    upstream = draw.normal(s["T"], *[s["K"]] * (not s.get("gated")), s["O"])
    return Problem(case, leaves, fixed, upstream, ("x",))


def _sizes(case):
    """(elements of x, of y, positions)."""
    s = case.shape
    P, own = s["T"] * s["K"], s.get("gated")
    return (P if own else s["T"]) * s["D"], (s["T"] if own else P) * s["O"], P


def cost(case):
    s, width, (x, y, P) = case.shape, DTYPES[case.dtype].itemsize, _sizes(case)
    weight, factors = s["E"] * s["O"] * s["D"], s["E"] * (s["D"] + s["O"]) * sum(s["ranks"])
    base, lora = 2 * P * s["D"] * s["O"], 2 * P * (s["D"] + s["O"]) * sum(s["ranks"]) / len(s["ranks"])
    fwd = Work((x + y + weight + factors) * width, base + lora, lora, base, None, BASE_DOT)
    return {"fwd": fwd, "bwd": Work((2 * x + y + weight + 2 * factors) * width, base + 2 * lora, 2 * lora, base, None, BASE_DOT)}


def saved_limit(case):
    x, _, P = _sizes(case)
    return (x + P * max(case.shape["ranks"])) * DTYPES[case.dtype].itemsize


def peak_limit(case):
    """Results, gradients, rank space, and 4 million float32 parts of results: no float32 copy of x or of the weights, no gathered rows."""
    s, (x, y, P) = case.shape, _sizes(case)
    results = x + y + s["E"] * (s["D"] + s["O"]) * sum(s["ranks"])
    return results * DTYPES[case.dtype].itemsize + 8 * P * (max(s["ranks"]) + 32) + 4 * 2**22


def _factors(problem):
    names = [f"{e}.{a}" for e in range(problem.case.shape["E"]) for a in range(len(problem.case.shape["ranks"]))]
    return [problem.leaves[f"A{n}"] for n in names], [problem.leaves[f"B{n}"] for n in names]


def _bank(problem):
    A, B = _factors(problem)
    return mtk.LoraBank.from_factors(A, B, SCALE, dropout=problem.case.shape["p"], seeds=list(range(len(A))))


def _ids(problem):
    return mtk.expert_adapter_ids(problem.fixed["experts"], problem.fixed["adapters"], len(problem.case.shape["ranks"]))


def _plan(problem):
    return mtk.group_plan(_ids(problem), problem.case.shape["E"] * (len(problem.case.shape["ranks"]) + 1), step=STEP)


def run(problem, backend):
    bank, plan, weight, leaves = _bank(problem), _plan(problem), problem.fixed["weight"], problem.leaves
    options = dict(gates=leaves.get("gates"), training=problem.training, backend=backend)
    return problem.call(lambda: mtk.moe_lora_linear(leaves["x"], weight, None, bank, plan, **options), given=(*plan.tensors(), *bank.tensors(), weight))


def plain(problem):
    bank, ids = _bank(problem), _ids(problem)
    if not problem.training:
        bank.threshold = torch.zeros_like(bank.threshold)
    return problem.call(lambda: plain_moe_lora(problem.leaves["x"], problem.fixed["weight"], None, bank, ids, STEP, 0, problem.leaves.get("gates")))


def _finished(problem, z):
    """z [P, O] as the case wants it."""
    z, gates = z.view(*problem.fixed["experts"].shape, -1), problem.leaves.get("gates")
    return z if gates is None else (z * gates[..., None]).sum(1).to(z.dtype)


def _rows(problem, places):
    x = problem.leaves["x"]
    return x.flatten(0, -2)[places if x.dim() == 3 else places // problem.case.shape["K"]]


def _by_expert(problem, part):
    """For every expert, part(e, rows, the adapter of each) of its rows, as the loops of MoE models do it."""
    experts, K = problem.fixed["experts"].flatten(), problem.case.shape["K"]
    z = problem.leaves["x"].new_zeros(len(experts), problem.case.shape["O"])
    for e in range(problem.case.shape["E"]):
        places = (experts == e).nonzero()[:, 0]
        if len(places):
            z.index_add_(0, places, part(e, _rows(problem, places), problem.fixed["adapters"][places // K]))
    return _finished(problem, z)


def _frozen(problem):
    """The experts without adapters."""
    weight, leaves = problem.fixed["weight"], {name: t for name, t in problem.leaves.items() if name in ("x", "gates")}
    return problem.call(lambda: _by_expert(problem, lambda e, rows, _: F.linear(rows, weight[e])), leaves)


def _loop(problem):
    """One expert after the other and in it one adapter after the other: index, drop, two matmuls, add."""
    (A, B), s, weight = _factors(problem), problem.case.shape, problem.fixed["weight"]

    def part(e, rows, adapters):
        y = F.linear(rows, weight[e])
        for a in range(len(s["ranks"])):
            own, i = (adapters == a).nonzero()[:, 0], e * len(s["ranks"]) + a
            y.index_add_(0, own, F.dropout(rows[own], s["p"], problem.training) @ A[i].T @ B[i].T * SCALE)
        return y

    return problem.call(lambda: _by_expert(problem, part))


def _merged(problem):
    """PEFT's way: W + s B A of every expert and adapter is made; no dropout."""
    (A, B), n, weight = _factors(problem), len(problem.case.shape["ranks"]), problem.fixed["weight"]

    def part(e, rows, adapters):
        y = rows.new_zeros(len(rows), len(weight[e]))
        for a in range(n):
            own, i = (adapters == a).nonzero()[:, 0], e * n + a
            y.index_add_(0, own, F.linear(rows[own], weight[e] + SCALE * (B[i] @ A[i])))
        return y

    return problem.call(lambda: _by_expert(problem, part))


def _padded(problem):
    """Rows gathered in the plan's order, F.grouped_mm for the experts and, ranks padded, for the adapters; no dropout."""
    (A, B), s, plan, weight = _factors(problem), problem.case.shape, _plan(problem), problem.fixed["weight"]
    n, widest, perm = len(s["ranks"]) + 1, max(s["ranks"]), plan.perm.long()
    none = [(A[0].new_zeros(widest, s["D"]), B[0].new_zeros(s["O"], widest))]
    pairs = [(F.pad(a.detach(), (0, 0, 0, widest - len(a))), F.pad(b.detach(), (0, widest - b.shape[1]))) for a, b in zip(A, B)]
    pairs = [pair for e in range(s["E"]) for pair in (*pairs[e * (n - 1) : (e + 1) * (n - 1)], *none)]
    A_GRD, B_GOR = (torch.stack(side).requires_grad_(problem.case.training) for side in zip(*pairs))
    by_group, by_expert = plan.offsets[1:], plan.offsets[n::n].contiguous()

    def fn():
        rows = _rows(problem, perm)
        u = F.grouped_mm(rows, A_GRD.transpose(1, 2), offs=by_group) * SCALE
        z = F.grouped_mm(rows, weight.transpose(1, 2), offs=by_expert) + F.grouped_mm(u, B_GOR.transpose(1, 2), offs=by_group)
        return _finished(problem, z[plan.inv_perm.long()])

    leaves = {name: t for name, t in problem.leaves.items() if name in ("x", "gates")}
    return problem.call(fn, {**leaves, "A padded": A_GRD, "B padded": B_GOR}, (perm, by_group, by_expert))


PROVIDERS = (
    Provider("frozen experts", _frozen, "part"),
    *ours(run),
    Provider("plan", lambda p: p.call(partial(_plan, p), {}), "part"),
    Provider("loop", _loop),
    Provider("merged", _merged),
    Provider("padded", _padded),
)
