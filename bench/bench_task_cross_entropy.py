"""task_cross_entropy: per-task cross entropy sums from logits, any upstream gradient per task."""

import torch
import torch.nn.functional as F

import mtkernels as mtk

from . import peers
from .registry import DTYPES, Bar, Case, Draw, Problem, Provider, Work, ours

LANGUAGE, LABELS, SLICE = dict(T=1024, V=32000, J=8), dict(T=4096, V=1024, J=8), dict(T=128, V=32000, J=8)
COUNTED, HIDDEN = dict(T=64, V=32000, J=8), dict(T=256, V=8192, J=8, H=256)
BARS = {"fp32": (Bar("cpu", "torch", 0.5),)}


def cases():
    return [
        Case("task_cross_entropy", "labels", LABELS, "torch", ("quick", "bars", "full"), dtypes=("fp32",), bars=BARS),
        Case("task_cross_entropy", "vocabulary, few rows", SLICE, "torch", ("quick",)),
        Case("task_cross_entropy", "vocabulary", LANGUAGE, "torch", ("bars", "full"), dtypes=("fp32",), bars=BARS),
        Case("task_cross_entropy", "vocabulary, 64 rows", COUNTED, "torch", ("cost",), dtypes=("bf16",)),
        Case("task_cross_entropy", "from hidden states", HIDDEN, "torch", ("cost",), dtypes=("bf16",)),
    ]


def inputs(case, device):
    draw, s = Draw(case, device), case.shape
    fixed = {"target": draw.ints(s["V"], s["T"]), "ids": draw.ints(s["J"], s["T"])}
    if "H" in s:
        leaves = {"hidden": draw.leaf(s["T"], s["H"]), "weight": draw.leaf(s["V"], s["H"], std=s["H"] ** -0.5)}
    else:
        leaves = {"logits": draw.leaf(s["T"], s["V"])}
    return Problem(case, leaves, fixed, draw.normal(s["J"], dtype=torch.float32), tuple(leaves)[:1])


def cost(case):
    n_rows, logits = case.shape["T"], case.shape["T"] * case.shape["V"]
    # target and task of each row, and a float a task; the backward reads logits and writes their gradient
    small, width = n_rows * (8 + 4) + 4 * case.shape["J"], DTYPES[case.dtype].itemsize
    if "H" in case.shape:  # logits need not be stored; the backward reads and writes hidden states and weight
        operands, product = (n_rows + case.shape["V"]) * case.shape["H"] * width, 2 * logits * case.shape["H"]
        forward = Work(operands + small, product + 4 * logits, product)
        return {"fwd": forward, "bwd": Work(2 * operands + small, 2 * product + 8 * logits, 2 * product)}
    return {"fwd": Work(logits * width + small, 4 * logits), "bwd": Work(2 * logits * width + small, 8 * logits)}


def saved_limit(case):
    # logits, and two floats a row: log-sum-exp and the nll that the task sums read
    return case.shape["T"] * (case.shape["V"] * DTYPES[case.dtype].itemsize + 8) + 64 * case.shape["J"]


def _plan(problem):
    return mtk.group_plan(problem.fixed["ids"], problem.case.shape["J"], step=0)


def _logits(problem):
    return problem.leaves["logits"] if "logits" in problem.leaves else F.linear(*problem.leaves.values())


def run(problem, backend):
    target, ids, n_tasks, plan = *problem.fixed.values(), problem.case.shape["J"], _plan(problem)
    return problem.call(
        lambda: mtk.task_cross_entropy(_logits(problem), target, ids, n_tasks, "sum", plan=plan, backend=backend).losses,
        given=plan.tensors(),
    )


def _with_nll(problem, nll):
    target, ids, sums = *problem.fixed.values(), problem.upstream.new_zeros(problem.case.shape["J"])
    return problem.call(lambda: sums.index_add(0, ids, nll(_logits(problem), target).to(sums.dtype)))


def _nll(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


def plain(problem):
    return _with_nll(problem, _nll)


PROVIDERS = (
    *ours(run),
    Provider("plan", lambda p: p.call(lambda: _plan(p), {}), "part"),
    Provider("torch", plain),
    Provider("compile", lambda p: _with_nll(p, peers.compiled(_nll, p.upstream.device.type)), slow=True, countable=False),
    Provider("liger", lambda p: _with_nll(p, peers.liger_cross_entropy(p.upstream.device.type))),
    Provider("liger linear", peers.liger_linear_cross_entropy, applies=lambda case: "H" in case.shape),
)
