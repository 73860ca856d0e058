"""Verify before timing: a backend's error against float64 is at most 1.5 times that of eager torch in the same dtype."""

from dataclasses import dataclass

import torch

from mtkernels.testing import FLOOR, relative_error

from .registry import DTYPES

ALLOWED = {"ours": 1.5, "peer": 10.0}  # a peer only has to compute the same thing


@dataclass(frozen=True)
class Check:
    """The tensor that comes closest to (or most exceeds) its limit."""

    ok: bool
    error: float
    limit: float
    tensor: str

    def __str__(self):
        return f"{'ok' if self.ok else 'FAIL'} {f'{self.error:.1e}' if self.error else 'exact'}"


class Yardstick:
    """Results in float64 from the reference, and the limits eager torch sets in the case's dtype."""

    def __init__(self, suite, problem):
        dtype = DTYPES.get(problem.case.dtype)
        exact = problem if dtype is None else problem.to(torch.float64)
        self.exact = suite.run(exact, "reference").results()
        plain = suite.plain(problem).results()
        self.plain = {name: relative_error(plain[name], t) for name, t in self.exact.items()}
        self.floor = 0.0 if dtype is None else FLOOR[dtype]

    def check(self, results, kind):
        checks = []
        for name in results.keys() & self.exact.keys():
            error = relative_error(results[name], self.exact[name])
            limit = ALLOWED[kind] * self.plain[name] + self.floor
            checks.append(Check(error <= limit, error, limit, name))
        # a NaN error is not ok, and worse than any number
        return max(checks, key=lambda c: (not c.ok, c.error != c.error, c.error / (c.limit or 1.0)))


class Verifier:
    """Checks providers of one problem; a peer draws its own dropout mask, so it is compared with dropout off."""

    def __init__(self, suite, problem):
        self.suite, self.problem, self.yardsticks = suite, problem, {}

    def check(self, provider, call):
        """The check of a provider's call on the problem; None for a part."""
        if provider.kind == "part":
            return None
        problem = self.problem
        if provider.kind == "peer" and problem.training and problem.case.shape.get("p"):
            problem = problem.without_dropout()
            call = provider.make(problem)
        if problem.training not in self.yardsticks:
            self.yardsticks[problem.training] = Yardstick(self.suite, problem)
        return self.yardsticks[problem.training].check(call.results(), provider.kind)
