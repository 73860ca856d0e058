"""Tools to test ops as this package tests its own: reproducible problems, the accuracy rule, poisoned outputs.

A `Problem` is one call of a public function on rows of several groups. Row content depends only on (group, ordinal in
the group), so the same rows can be put in other batches and the results compared bit for bit.
"""

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable
from zlib import crc32

import torch

from .bank import LoraBank
from .ops import group_plan, lora_delta, lora_linear, task_cross_entropy, task_reduce
from .reference.philox import keep_mask

# relative error below which no kernel is asked to be better than the plain path
FLOOR = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


@dataclass
class Problem:
    """fn() runs the op on `leaves`; plain() is the same in eager torch; `upstream` is the gradient of the output.

    by_row: names whose first dimension is the batch row ("out" is the output); by_group: name -> its group, or None
    when the first dimension is the group. The other names (the shared base) carry no per-group promise.
    """

    ids: list
    n_groups: int
    leaves: dict
    fn: Callable
    plain: Callable
    upstream: torch.Tensor
    by_row: tuple = ()
    by_group: dict = None

    def results(self, fn=None):
        """{"out": output, leaf name: its gradient}."""
        out = (fn or self.fn)()
        grads = torch.autograd.grad(out, list(self.leaves.values()), self.upstream, allow_unused=True)
        zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, self.leaves.values()))
        return {"out": out.detach(), **dict(zip(self.leaves, zeros))}

    def group_slices(self, results):
        """{(name, group): bits that belong to the group}, rows in the group's own order."""
        rows = {g: [t for t, i in enumerate(self.ids) if i == g] for g in set(self.ids)}
        own = {(name, g): results[name][index] for name in self.by_row for g, index in rows.items()}
        for name, group in (self.by_group or {}).items():
            own.update({(name, g): results[name][g] for g in rows if g >= 0} if group is None else {(name, group): results[name]})
        return own


def _randn(*shape, key, dtype, exact):
    generator = torch.Generator().manual_seed(crc32(repr(key).encode()))
    t = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return t.double() if exact else t


class Maker:
    """Random tensors whose rows depend only on (name, group, ordinal); `exact` gives the rounded values in float64."""

    def __init__(self, ids, dtype, device, exact):
        self.ids, self.dtype, self.device, self.exact = ids, dtype, device, exact
        seen = Counter()
        self.ordinals = [(g, seen.update([g]) or seen[g] - 1) for g in ids]

    def tensor(self, key, *shape, dtype=None, grad=True):
        return _randn(*shape, key=key, dtype=dtype or self.dtype, exact=self.exact).to(self.device).requires_grad_(grad)

    def rows(self, key, *shape, dtype=None, grad=True):
        # As many rows in every batch, so that a row's values are the same in all of them.
        longest = max((o for _, o in self.ordinals), default=0) + 1
        n_rows = max(longest, 2048 if math.prod(shape) < 512 else 256)
        tables = {g: _randn(n_rows, *shape, key=(key, g), dtype=dtype or self.dtype, exact=self.exact) for g in set(self.ids)}
        rows = [tables[g][o] for g, o in self.ordinals]
        empty = torch.empty(0, *shape, dtype=torch.float64 if self.exact else dtype or self.dtype)
        return (torch.stack(rows) if rows else empty).to(self.device).requires_grad_(grad)

    def id_tensor(self):
        return torch.tensor(self.ids, dtype=torch.int64, device=self.device)


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


RANKS = (3, 0, 16, 1, 7, 130)
DROPOUT = (0.0, 0.5, 0.25, 1.0, 0.05, 0.5)


def _bank(make, n_in, n_out, factor_dtype):
    n = len(RANKS)
    A = [make.tensor(("A", i), r, n_in, dtype=factor_dtype) for i, r in enumerate(RANKS)]
    B = [make.tensor(("B", i), n_out, r, dtype=factor_dtype) for i, r in enumerate(RANKS)]
    bias = [make.tensor(("beta", i), n_out, dtype=factor_dtype) if i % 2 else None for i in range(n)]
    scale = [0.5 + 0.25 * i for i in range(n)]
    bank = LoraBank.from_factors(A, B, scale, dropout=list(DROPOUT), seeds=list(range(7, 7 + n)), bias=bias)
    leaves = {f"A{i}": t for i, t in enumerate(A)} | {f"B{i}": t for i, t in enumerate(B)}
    return bank, leaves | {f"beta{i}": t for i, t in enumerate(bias) if t is not None}


def plain_lora(x, y, bank, ids, step, site):
    """PEFT's loop in eager torch, in the tensors' own dtypes: index, drop, two matmuls, add."""
    for i, (a, b) in enumerate(zip(bank.A, bank.B)):
        rows = (ids == i).nonzero()[:, 0]
        xd = x[rows].to(a.dtype)
        t = int(bank.threshold[i])
        if t:
            keep = keep_mask(len(rows), x.shape[1], t, int(bank.seeds[i]), torch.tensor(step), site, "cpu").to(x.device)
            xd = xd * keep * (65536 / (65536 - t) if t < 65536 else 0.0)
        delta = xd @ a.T @ b.T
        if bank.bias and bank.bias[i].numel():
            delta = delta + bank.bias[i]
        y = y.index_add(0, rows, (delta * bank.scale[i]).to(y.dtype))
    return y


def _lora(with_base, ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72, n_out=40):
    make = Maker(ids, dtype, device, exact)
    bank, factors = _bank(make, n_in, n_out, factor_dtype)
    x, id_tensor = make.rows("x", n_in), make.id_tensor()
    leaves, by_group = {"x": x, **factors}, {name: int(name.lstrip("ABbeta")) for name in factors}
    upstream = make.rows("dy", n_out, grad=False)

    def plan():
        return group_plan(id_tensor, len(RANKS), step=11, backend=backend)

    if not with_base:
        return Problem(
            ids,
            len(RANKS),
            leaves,
            lambda: lora_delta(x, bank, plan(), site=3, backend=backend),
            lambda: plain_lora(x, x.new_zeros(len(ids), n_out), bank, id_tensor, 11, 3),
            upstream,
            by_row=("out", "x"),
            by_group=by_group,
        )
    leaves |= {"weight": make.tensor("weight", n_out, n_in), "bias": make.tensor("bias", n_out)}
    weight, bias = leaves["weight"], leaves["bias"]
    return Problem(
        ids,
        len(RANKS),
        leaves,
        lambda: lora_linear(x, weight, bias, bank, plan(), site=3, backend=backend),
        lambda: plain_lora(x, torch.nn.functional.linear(x, weight, bias), bank, id_tensor, 11, 3),
        upstream,
        by_group=by_group,
    )


def _task_reduce(ids, dtype, device="cpu", *, backend=None, exact=False, n_groups=6):
    make = Maker(ids, dtype, device, exact)
    values, coef, id_tensor = make.rows("values"), make.rows("coef", dtype=_wide(dtype)), make.id_tensor()
    index = torch.where(id_tensor < 0, n_groups, id_tensor)
    return Problem(
        ids,
        n_groups,
        {"values": values, "coef": coef},
        lambda: task_reduce(values, id_tensor, n_groups, coef, backend=backend),
        lambda: coef.new_zeros(n_groups + 1).index_add(0, index, values.to(coef.dtype) * coef)[:-1],
        make.tensor("dsums", n_groups, dtype=_wide(dtype), grad=False),
        by_row=("values", "coef"),
        by_group={"out": None},
    )


def _task_cross_entropy(ids, dtype, device="cpu", *, backend=None, exact=False, n_groups=6, n_classes=53):
    make = Maker(ids, dtype, device, exact)
    logits, weight, id_tensor = make.rows("logits", n_classes), make.rows("weight", dtype=_wide(dtype)), make.id_tensor()
    with torch.no_grad():  # some classes that do not exist, some rows that are sure of their target
        logits[:, 5] = -torch.inf
        target = (make.rows("target", grad=False, dtype=torch.float32).abs() * 1000).long() % n_classes
        target = torch.where(target == 5, -100, target)
        logits[target == 7, 7] += 20

    def plain():
        nll = torch.nn.functional.cross_entropy(logits, torch.where(id_tensor < 0, -100, target), reduction="none")
        index = torch.where(id_tensor < 0, n_groups, id_tensor)
        valid = ((target != -100) & (id_tensor >= 0)).to(weight.dtype)
        bins = weight.new_zeros(n_groups + 1)
        return (bins.index_add(0, index, nll.to(weight.dtype) * weight) / bins.index_add(0, index, valid).clamp(min=1))[:-1]

    return Problem(
        ids,
        n_groups,
        {"logits": logits, "weight": weight},
        lambda: task_cross_entropy(logits, target, id_tensor, n_groups, token_weight=weight, backend=backend).losses,
        plain,
        make.tensor("dlosses", n_groups, dtype=_wide(dtype), grad=False),
        by_row=("logits", "weight"),
        by_group={"out": None},
    )


PROBLEMS = {
    "lora_linear": lambda *args, **kw: _lora(True, *args, **kw),
    "lora_delta": lambda *args, **kw: _lora(False, *args, **kw),
    "task_reduce": _task_reduce,
    "task_cross_entropy": _task_cross_entropy,
}

# Group 1 is empty (and rank 0), group 3 has one row.
MIXED = [0, 2, -1, 4, 0, 5, 2, 2, -1, 4, 5, 5, 0, 3, 5, 2]

# (ids, options) with which a problem gives its Triton kernels several programs on every axis of the grid, and ragged edges.
_LARGE = {
    "task_reduce": (MIXED * 3 + [2] * 1100, dict(n_groups=70)),
    "task_cross_entropy": (MIXED * 3, dict(n_classes=4099)),
}


def large(name):
    """(ids, keyword arguments) of a problem at a size that spans several tiles in every dimension."""
    return _LARGE.get(name, (MIXED * 3 + [2] * 150, {}))


@contextmanager
def poisoned():
    """Every torch.empty in the block holds NaN (integers: the largest value), so unwritten outputs show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def relative_error(actual, exact):
    """Frobenius norm of the difference over the norm of `exact` (or the plain norm when that is zero)."""
    exact, actual = exact.double(), actual.double()
    return float((actual - exact).norm() / (exact.norm() or 1.0))


def assert_accurate(actual, plain, exact, dtype, what=""):
    """error(actual) <= 1.5 error(plain) + floor, both against the float64 result."""
    assert torch.isfinite(actual).all() or not torch.isfinite(exact).all(), f"{what}: not finite"
    ours, theirs = relative_error(actual, exact), relative_error(plain, exact)
    assert ours <= 1.5 * theirs + FLOOR[dtype], f"{what}: error {ours:.2e}, plain torch {theirs:.2e} ({dtype})"
