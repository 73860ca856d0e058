"""Tools to test ops as this package tests its own: reproducible problems, the accuracy rule, poisoned outputs.

A `Problem` is one call of a public function on rows of several groups. Row content depends only on (group, ordinal in
the group), so the same rows can be put in other batches and the results compared bit for bit.
"""

from contextlib import contextmanager

import torch

from .dora import DORA_PROBLEMS
from .lora import LORA_PROBLEMS, plain_lora
from .loss import LOSS_PROBLEMS
from .moe import MOE_PROBLEMS, plain_moe_lora
from .problem import Maker, Problem
from .producers import PRODUCER_PROBLEMS, plain_rmsnorm

__all__ = ["FLOOR", "MIXED", "Maker", "PROBLEMS", "Problem", "assert_accurate", "large", "op_of", "plain_lora", "plain_moe_lora", "plain_rmsnorm", "poisoned", "relative_error"]

# An op, or "op:variant" for another way to call it -> (ids, dtype, device="cpu", *, backend=None, exact=False) -> Problem
PROBLEMS = {**LORA_PROBLEMS, **DORA_PROBLEMS, **PRODUCER_PROBLEMS, **MOE_PROBLEMS, **LOSS_PROBLEMS}

# Group 1 is empty (and rank 0), group 3 has one row.
MIXED = [0, 2, -1, 4, 0, 5, 2, 2, -1, 4, 5, 5, 0, 3, 5, 2]

# (ids, options) with which a problem gives its Triton kernels several programs on every axis of the grid, and ragged edges.
_LARGE = {
    "dora_dropout": (MIXED * 3, dict(n_in=300)),
    "dora_rescale": (MIXED * 3, dict(n_out=300)),
    "lora_delta:dropped": (MIXED * 3, dict(n_in=300)),
    "task_reduce": (MIXED * 3 + [2] * 1100, dict(n_groups=70)),
    "task_cross_entropy": (MIXED * 3, dict(n_classes=4099)),
}

# relative error below which no kernel is asked to be better than the plain path
FLOOR = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


def op_of(name):
    """The registered op that problem `name` is about."""
    return name.split(":")[0]


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
