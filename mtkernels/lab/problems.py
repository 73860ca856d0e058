"""Each op as the lab's commands run it: forward and backward on a problem of mtkernels.testing, judged against float64."""

from dataclasses import dataclass

import torch

from ..bank import LoraBank
from ..ops import STEMS, group_plan, lora_dropout_mask, stem_of
from ..reference.group_plan import group_plan as reference_plan
from ..reference.lora_dropout_mask import lora_dropout_mask as reference_mask
from ..testing import FLOOR, MIXED, PROBLEMS, large, poisoned, relative_error
from ..testing.lora import DROPOUT, SITE

OPS = tuple(op for ops in STEMS.values() for op in ops)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
            return dict(zip(PLAN, group_plan(*_ids(), step=0, backend=backend).tensors()))
        if op == "lora_dropout_mask":
            return {"bits": lora_dropout_mask(*_mask_args(), site=SITE, backend=backend)}
        return _problem(op, dtype, backend).results()


def checks(op, dtype, backend, actual):
    """A Check of each of the results of an op on `backend`, the worst first."""
    if op == "group_plan":
        found = _differences(actual, dict(zip(PLAN, reference_plan(*_ids()))))
    elif op == "lora_dropout_mask":
        bank, plan, n_cols = _mask_args()
        groups = plan.offsets, plan.perm, plan.tiles, plan.step
        found = _differences(actual, {"bits": reference_mask(bank.threshold, bank.seeds, *groups, SITE, n_cols)})
    else:
        exact, plain = _problem(op, dtype, backend, exact=True), _problem(op, dtype, backend)
        exact, plain = exact.results(exact.plain), plain.results(plain.plain)
        found = [_check(name, actual[name], plain[name], t, dtype) for name, t in exact.items()]
    return sorted(found, key=lambda c: (c.ok, -c.error / (c.limit or 1.0)))


def _differences(actual, exact):
    return [Check(name, float((actual[name] != t).sum()), 0.0) for name, t in exact.items()]


def _problem(op, dtype, backend, exact=False):
    """Rows for several programs of every kernel; in the CUDA emulator every group costs a block of threads, so a few groups."""
    ids, sizes = large(op)
    return PROBLEMS[op](ids, dtype, backend=backend, exact=exact, **({} if backend == "cuda" else sizes))


def _ids():
    """Ragged groups, empty ones, rows without group, more rows and groups than a program takes."""
    ids, sizes = large("task_reduce")
    return torch.tensor(ids), sizes["n_groups"]


def _mask_args():
    """Adapters with and without dropout and with nothing else, one of them without rows; rows of none; a ragged last byte."""
    factors = [torch.zeros(1, 1) for _ in DROPOUT]
    bank = LoraBank.from_factors(factors, factors, 1.0, dropout=list(DROPOUT), seeds=list(range(len(DROPOUT))))
    return bank, group_plan(torch.tensor(MIXED * 3), len(DROPOUT), step=11, backend="reference"), 1100


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
