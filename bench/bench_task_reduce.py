"""task_reduce: per-task sums of coef * values."""

import torch

import mtkernels as mtk

from .registry import DTYPES, Case, Draw, Problem, Provider, Work, ours

BATCH, LONG = dict(T=8192, J=8), dict(T=262144, J=8)


def cases():
    return [
        Case("task_reduce", "batch", BATCH, "torch", ("quick", "full", "cost")),
        Case("task_reduce", "long", LONG, "torch", ("quick", "full")),
    ]


def inputs(case, device):
    draw, n_rows = Draw(case, device), case.shape["T"]
    leaves = {"values": draw.leaf(n_rows), "coef": draw.leaf(n_rows, dtype=torch.float32)}
    fixed = {"ids": draw.ints(case.shape["J"], n_rows)}
    return Problem(case, leaves, fixed, draw.normal(case.shape["J"], dtype=torch.float32), ("values", "coef"))


def cost(case):
    n_rows, per_row, sums = case.shape["T"], DTYPES[case.dtype].itemsize + 4, 4 * case.shape["J"]
    # 4 bytes a row name its task; the backward reads and writes both values and coef
    forward = Work(n_rows * (per_row + 4) + sums, 2 * n_rows)
    return {"fwd": forward, "bwd": Work(n_rows * (2 * per_row + 4) + sums, 2 * n_rows)}


def saved_limit(case):
    return case.shape["T"] * (DTYPES[case.dtype].itemsize + 4)


def run(problem, backend):
    values, coef, ids, n_tasks = *problem.leaves.values(), problem.fixed["ids"], problem.case.shape["J"]
    plan = mtk.group_plan(ids, n_tasks, step=0)
    return problem.call(lambda: mtk.task_reduce(values, ids, n_tasks, coef, plan=plan, backend=backend), given=plan.tensors())


def plain(problem):
    values, coef, ids, n_tasks = *problem.leaves.values(), problem.fixed["ids"], problem.case.shape["J"]
    return problem.call(lambda: coef.new_zeros(n_tasks).index_add(0, ids, values.to(coef.dtype) * coef))


PROVIDERS = (
    *ours(run),
    Provider("plan", lambda p: p.call(lambda: mtk.group_plan(p.fixed["ids"], p.case.shape["J"], step=0), {}), "part"),
    Provider("torch", plain),
)
