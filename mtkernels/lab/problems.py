"""Each op as the lab's commands run it: forward and backward on a problem of mtkernels.testing, judged against float64."""

from dataclasses import dataclass

import torch

from ..ops import STEMS, group_plan, stem_of
from ..reference.group_plan import group_plan as reference_plan
from ..testing import FLOOR, PROBLEMS, poisoned, relative_error

OPS = tuple(op for ops in STEMS.values() for op in ops)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Ragged groups, an empty one, one of a single row, rows without group, and one of several row tiles.
IDS = [0, 2, -1, 4, 0, 5, 2, 2, -1, 4, 5, 5, 0, 3, 5, 2] * 3 + [2] * 150
N_GROUPS = 6
PLAN = ("ids", "counts", "offsets", "perm", "inv_perm", "tiles")


@dataclass(frozen=True)
class Check:
    """One result: its error against float64, relative to the norm, and 1.5 times that of plain torch in the same dtype."""

    tensor: str
    error: float
    limit: float

    @property
    def ok(self):
        return self.error <= self.limit


def chosen(names, stems=None):
    """Ops by op or stem name; all of them without names. stems: those that can run; naming another raises ValueError."""
    for name in names:
        if name not in (*OPS, *STEMS):
            raise ValueError(f"no op {name!r}; there are {', '.join(OPS)}")
    ops = [op for op in OPS if not names or op in names or stem_of(op) in names]
    able = [op for op in ops if stems is None or stem_of(op) in stems]
    if names and able != ops:
        raise ValueError(f"{', '.join(op for op in ops if op not in able)} cannot run there; {', '.join(op for op in OPS if stem_of(op) in stems)} can")
    return able


def results(op, dtype, backend):
    """{tensor: values} of the op on `backend`, outputs and gradients; outputs hold NaN before the kernels write them."""
    with poisoned():
        if op == "group_plan":
            plan = group_plan(torch.tensor(IDS), N_GROUPS, step=0, backend=backend)
            return dict(zip(PLAN, plan.tensors()))
        return PROBLEMS[op](IDS, dtype, backend=backend).results()


def checks(op, dtype, actual):
    """A Check of each result, the worst first."""
    if op == "group_plan":
        exact = dict(zip(PLAN, reference_plan(torch.tensor(IDS), N_GROUPS)))
        found = [Check(name, float((actual[name] != t).sum()), 0.0) for name, t in exact.items()]
    else:
        exact, plain = PROBLEMS[op](IDS, dtype, exact=True), PROBLEMS[op](IDS, dtype)
        exact, plain = exact.results(exact.plain), plain.results(plain.plain)
        found = [_check(name, actual[name], plain[name], t, dtype) for name, t in exact.items()]
    return sorted(found, key=lambda c: (c.ok, -c.error / (c.limit or 1.0)))


def _check(name, actual, plain, exact, dtype):
    same_kind = actual.shape == plain.shape and actual.dtype == plain.dtype
    finite = bool(actual.isfinite().all()) or not bool(exact.isfinite().all())
    error = relative_error(actual, exact) if same_kind and finite else float("inf")
    return Check(name, error, 1.5 * relative_error(plain, exact) + FLOOR[dtype])


def different_bits(first, second):
    """Names of tensors whose bits differ."""
    return [name for name, t in first.items() if not torch.equal(_bits(t), _bits(second[name]))]


def _bits(t):
    return t.detach().contiguous().view(-1).view(torch.uint8) if t.numel() else torch.empty(0, dtype=torch.uint8)
