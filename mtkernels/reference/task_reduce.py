"""sums[j] = sum of coef[t] * values[t] over the rows t of task j."""

import torch


def task_reduce_fwd(values, coef, offsets, perm, tiles):
    weighted = values.double() if coef is None else values.double() * coef.double()
    weighted, bounds = weighted[perm.long()], offsets.tolist()
    sums = [weighted[lo:hi].sum() for lo, hi in zip(bounds, bounds[1:])]
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.stack(sums).to(dtype) if sums else values.new_zeros(0, dtype=dtype)


def task_reduce_bwd(dsums, values, coef, ids):
    d = torch.where(ids < 0, 0, dsums[ids.clamp(min=0).long()]) if len(dsums) else dsums.new_zeros(len(ids))
    dvalues = (d if coef is None else d * coef).to(values.dtype)
    dcoef = d.new_zeros(0) if coef is None else torch.where(ids < 0, 0, d * values.to(d.dtype))
    return torch.where(ids < 0, 0, dvalues), dcoef
