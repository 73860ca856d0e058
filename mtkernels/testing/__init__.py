"""Tools to test ops as this package tests its own: reproducible problems, the accuracy rule, poisoned outputs.

A `Problem` is one call of a public function on rows of several groups. Row content depends only on (group, ordinal in
the group), so the same rows can be put in other batches and the results compared bit for bit.
"""

from contextlib import contextmanager

import torch

from .lora import LORA_PROBLEMS, plain_lora
from .loss import LOSS_PROBLEMS
from .problem import Maker, Problem
from .producers import PRODUCER_PROBLEMS, plain_rmsnorm

__all__ = ["FLOOR", "Maker", "PROBLEMS", "Problem", "assert_accurate", "op_of", "plain_lora", "plain_rmsnorm", "poisoned", "relative_error"]

# An op, or "op:variant" for another way to call it -> (ids, dtype, device="cpu", *, backend=None, exact=False) -> Problem
PROBLEMS = {**LORA_PROBLEMS, **PRODUCER_PROBLEMS, **LOSS_PROBLEMS}

# relative error below which no kernel is asked to be better than the plain path
FLOOR = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


def op_of(name):
    """The registered op that problem `name` is about."""
    return name.split(":")[0]


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
