"""swiglu_lora_shrink: a gated product and the adapters of the layer behind it, whose base is the identity; and a whole MLP."""

import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels.testing import plain_lora

from . import peers
from .registry import DTYPES, Case, Draw, Problem, Provider, Work, ours

SCALE, STEP = 2.0, 11
MIXED = dict(T=2048, D=1024, ranks=(4, 8, 8, 16, 16, 32, 64, 64), p=0.05)
EVEN = {**MIXED, "T": 512, "D": 512, "p": 0.0}
MLP = dict(T=1024, D=1024, H=2816, ranks=(16,) * 8, p=0.05)
SIDES = ("gate", "up", "down")


def cases():
    return [
        Case("swiglu_lora_shrink", "mixed", MIXED, "separate", ("quick", "full")),
        Case("swiglu_lora_shrink", "even", EVEN, "separate", ("cost",), dtypes=("bf16",)),
        Case("lora_swiglu_mlp", "Llama block", MLP, "separate", ("full",)),
    ]


def _is_mlp(case):
    return case.op == "lora_swiglu_mlp"


def _shapes(s):
    return dict(gate=(s["H"], s["D"]), up=(s["H"], s["D"]), down=(s["D"], s["H"]))


def inputs(case, device):
    draw, s, fixed = Draw(case, device), case.shape, {}
    shapes = _shapes(s) if _is_mlp(case) else dict(down=(s["D"], s["D"]))
    leaves = {name: draw.leaf(s["T"], s["D"]) for name in (("x",) if _is_mlp(case) else ("gate", "up"))}
    for side, (n_out, n_in) in shapes.items():
        for i, r in enumerate(s["ranks"]):
            leaves[f"{side}A{i}"], leaves[f"{side}B{i}"] = draw.leaf(r, n_in, std=n_in**-0.5), draw.leaf(n_out, r, std=r**-0.5)
        fixed[f"w_{side}"] = draw.normal(n_out, n_in, std=n_in**-0.5)
    rows = ("x",) if _is_mlp(case) else ("gate", "up")
    return Problem(case, leaves, {**fixed, "ids": draw.ints(len(s["ranks"]), s["T"])}, draw.normal(s["T"], s["D"]), rows)


def cost(case):
    s, ranks, width = case.shape, case.shape["ranks"], DTYPES[case.dtype].itemsize
    features = sum(sum(shape) for shape in _shapes(s).values()) if _is_mlp(case) else 2 * s["D"]
    weights = 3 * s["D"] * s["H"] if _is_mlp(case) else 0
    rows = s["T"] * (2 * s["D"] + 3 * s["H"] if _is_mlp(case) else 4 * s["D"])  # gate, up, h, y
    n_bytes = (rows + features * sum(ranks) + weights) * width
    base, lora = 2 * s["T"] * weights, 2 * s["T"] * features * sum(ranks) / len(ranks)
    return {"fwd": Work(n_bytes, base + lora, lora, base), "bwd": Work(2 * n_bytes, base + 2 * lora, 2 * lora, base)}


def saved_limit(case):
    s, R = case.shape, max(case.shape["ranks"])
    return s["T"] * (s["D"] + 2 * s["H"] + 3 * R if _is_mlp(case) else 2 * s["D"] + R) * DTYPES[case.dtype].itemsize


def _bank(problem, side):
    s = problem.case.shape
    A, B = ([problem.leaves[f"{side}{f}{i}"] for i in range(len(s["ranks"]))] for f in "AB")
    return mtk.LoraBank.from_factors(A, B, SCALE, dropout=s["p"], seeds=list(range(len(A))))


def _parts(problem):
    """(banks, weights) of the layers the case has, and the plan."""
    sides = SIDES if _is_mlp(problem.case) else ("down",)
    plan = mtk.group_plan(problem.fixed["ids"], len(problem.case.shape["ranks"]), step=STEP)
    return [_bank(problem, side) for side in sides], [problem.fixed[f"w_{side}"] for side in sides], plan


def run(problem, backend):
    (*_, down), weights, plan = banks, _, _ = _parts(problem)
    options, leaves = dict(training=problem.training, backend=backend), problem.leaves

    def mlp():
        return mtk.lora_swiglu_mlp(leaves["x"], *weights, banks, plan, **options)

    def product():
        h, s = mtk.swiglu_lora_shrink(leaves["gate"], leaves["up"], down, plan, site=2, **options)
        return mtk.lora_expand(s, down, plan, h, backend=backend)

    given = (*plan.tensors(), *(t for bank in banks for t in bank.tensors()), *weights)
    return problem.call(mlp if _is_mlp(problem.case) else product, given=given)


def _separate(problem, product=lambda gate, up: F.silu(gate) * up):
    """lora_linear for every layer, plain torch (or `product`) between them."""
    (*_, down), weights, plan = banks, _, _ = _parts(problem)
    options, leaves = dict(training=problem.training), problem.leaves

    def fn():
        if not _is_mlp(problem.case):
            h = product(leaves["gate"], leaves["up"])
            return mtk.lora_delta(h, down, plan, h, site=2, **options)
        h = product(*mtk.lora_linear_group(leaves["x"], weights[:2], None, banks[:2], plan, **options))
        return mtk.lora_linear(h, weights[2], None, down, plan, site=2, **options)

    given = (*plan.tensors(), *(t for bank in banks for t in bank.tensors()), *weights)
    return problem.call(fn, given=given)


def plain(problem):
    (banks, weights, _), leaves, ids = _parts(problem), problem.leaves, problem.fixed["ids"]
    for bank in () if problem.training else banks:
        bank.threshold = torch.zeros_like(bank.threshold)

    def fn():
        if not _is_mlp(problem.case):
            h = F.silu(leaves["gate"]) * leaves["up"]
            return plain_lora(h, h, banks[0], ids, STEP, 2)
        x = leaves["x"]
        gate, up = (plain_lora(x, F.linear(x, weights[g]), banks[g], ids, STEP, g) for g in range(2))
        h = F.silu(gate) * up
        return plain_lora(h, F.linear(h, weights[2]), banks[2], ids, STEP, 2)

    return problem.call(fn)


def _liger(problem):
    return _separate(problem, peers.liger_swiglu(problem.fixed["ids"].device.type))


PROVIDERS = (*ours(run), Provider("separate", _separate), Provider("loop", plain), Provider("liger", _liger))
