"""group_plan: rows grouped by id."""

import torch

import mtkernels as mtk
from mtkernels.plan import TILE_ROWS

from .registry import Case, Draw, Problem, Provider, Work, ours

SMALL, ROUTED = dict(T=2048, G=8), dict(T=65536, G=64)


def cases():
    options = dict(dtypes=("int64",), modes=("fwd",), training=False)
    return [
        Case("group_plan", "adapters", SMALL, "torch", ("quick", "full", "cost"), **options),
        Case("group_plan", "routed rows", ROUTED, "torch", ("quick", "full"), **options),
    ]


def inputs(case, device):
    ids = Draw(case, device).ints(case.shape["G"], case.shape["T"], low=-1)
    return Problem(case, {}, {"ids": ids})


def cost(case):
    # reads the ids; writes ids, permutation and its inverse, counts, offsets, and a tile table per tile height
    n_rows, n_groups = case.shape["T"], case.shape["G"]
    n_int32 = 3 * n_rows + n_groups + (1 + len(TILE_ROWS)) * (n_groups + 1)
    return {"fwd": Work(8 * n_rows + 4 * n_int32, 0)}


def run(problem, backend):
    ids, n_groups = problem.fixed["ids"], problem.case.shape["G"]
    # the permutation is the part that a peer computes too
    return problem.call(lambda: mtk.group_plan(ids, n_groups, step=0, backend=backend).perm)


def plain(problem):
    ids, n_groups = problem.fixed["ids"], problem.case.shape["G"]

    def fn():
        bins = torch.where(ids < 0, n_groups, ids)
        counts = torch.bincount(bins, minlength=n_groups + 1)
        counts.cumsum(0)
        perm = bins.argsort(stable=True)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(len(perm), device=perm.device)
        return perm

    return problem.call(fn)


PROVIDERS = (*ours(run), Provider("torch", plain))
