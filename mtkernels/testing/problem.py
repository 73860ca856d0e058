"""A Problem is one call of a public function on reproducible rows of several groups."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Callable
from zlib import crc32

import torch


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


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)
