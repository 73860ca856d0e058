"""DoRA: row norms of adapted weights, the dropped rows both its products read, and rows scaled by their adapter

    norm_i = ||W + s_i B_i A_i|| by row        x_d[t] = M[t] o x[t]        y[t] = scale[i] o z[t] + base[t], i the adapter of t
    dz[t] = scale[i] o dy[t]                   dscale[i] = sum of dy[t] o z[t] over the rows t of adapter i

scale is 1 in rows of no adapter. M as in lora_shrink; such rows keep x. base may repeat one row (stride 0).
"""

import torch

from .lora_shrink import _multiplier, wide


def dora_norm(weight, A, B, scale):
    rows = [wide(weight) + s * (wide(b) @ wide(a)) for a, b, s in zip(A, B, scale)]
    return torch.stack([row.norm(dim=1) for row in rows])


def dora_dropout(x, threshold, seeds, offsets, perm, tiles, step, site):
    y, bounds, perm = x.clone(memory_format=torch.contiguous_format), offsets.tolist(), perm.long()
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        rows = perm[begin:end]
        m = _multiplier(len(rows), x, i, threshold, seeds, step, site, True)
        y[rows] = (wide(x)[rows] * m).to(x.dtype)
    return y


def dora_fwd(z, base, scale, ids):
    y = _row_scale(scale, ids) * z
    return (y if base is None else y + base).to(z.dtype)


def dora_bwd(dy, z, scale, ids, offsets, perm, tiles):
    """dz [T, O] and dscale [n, O]; without z, only dz."""
    dz = (_row_scale(scale, ids) * dy).to(dy.dtype)
    if z is None:
        return dz, scale.new_empty(0)
    bins = scale.new_zeros(len(scale) + 1, scale.shape[1])
    place = torch.where(ids < 0, len(scale), ids).long()
    return dz, bins.index_add(0, place, dy.to(scale.dtype) * z.to(scale.dtype))[:-1]


def _row_scale(scale, ids):
    return torch.cat([scale, scale.new_ones(1, scale.shape[1])])[ids.long()]  # id -1 is the last row
