"""Experts' frozen weights with LoRA on each: group g = e (A + 1) + a holds the positions of expert e's adapter a, or of none (a = A).

    z_p = x[row] W_e^T + b_e + s ((M o x[row]) A^T B^T + beta)          y_p = z_p, or with gates y_t = sum_k c_tk z_tk
    dx[row] += c_p dy[row'] W_e + M o (dS A)                            dc_p = (dy[row'] W_e) . x[row] + dy[row'] . b_e + s e_p

x has a row per position, or one for all K positions of a row of the plan; y and dy are per position without gates, per row with
them. Lists of factors and gradients hold A + 1 per expert, the last of rank 0; scale, threshold and seeds A per expert. S, dS, e
empty gradients and bits as in lora_shrink and lora_expand.
"""

import torch.nn.functional as F

from .lora_expand import lora_expand_bwd, lora_expand_fwd
from .lora_shrink import lora_shrink_bwd, lora_shrink_fwd, wide


def moe_lora_linear_fwd(x, weight, bias, A, B, lora_bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, site, dropout, bits=None):
    """(y, S): y [P, O], or [T, O] with gates [T, K]."""
    z, plan = wide(x).new_zeros(len(perm), weight.shape[1]), (offsets, perm, tiles)
    for e, places in _experts(weight, offsets, perm):
        z[places] = wide(x)[_rows(places, x, perm)] @ wide(weight[e]).T + (0 if bias is None else wide(bias[e]))
    s = lora_shrink_fwd(x, A, *_with_none(weight, threshold, seeds), *plan, step, [site], dropout, bits)
    lora_expand_fwd(s, B, lora_bias, *_with_none(weight, scale), None, *plan, [z])
    if gates is not None:
        z = (z.view(*gates.shape, z.shape[1]) * gates[:, :, None]).sum(1)
    return z.to(x.dtype), s


def moe_lora_linear_bwd(
    dy, x, weight, bias, s, A, B, lora_bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, site, dropout, dx, dgates, e, dA, dB, dbias, bits=None
):
    """dx, dgates [T, K] and e [1, P], where not None, and the gradients are written; x is read for dA and dgates only."""
    plan, flat = (offsets, perm, tiles), None if gates is None else gates.reshape(-1)
    ((scale,),), ds = _with_none(weight, scale), s.new_empty(s.shape)
    lora_expand_bwd([dy], s, B, lora_bias, [scale], flat, *plan, ds, e, dB, dbias)
    total, dc = wide(x).new_zeros(x.shape), wide(x).new_zeros(len(perm))
    for i, places in _experts(weight, offsets, perm):
        rows, dy_i = _rows(places, x, perm), wide(dy)[_rows(places, dy, perm)]
        d = dy_i @ wide(weight[i])
        if dgates is not None:
            dc[places] = (d * wide(x)[rows]).sum(1) + (0 if bias is None else dy_i @ wide(bias[i]))
        total.index_add_(0, rows, d if flat is None else d * flat[places, None].to(d.dtype))
    lora_shrink_bwd(ds, x, A, *_with_none(weight, threshold, seeds), *plan, step, [site], dropout, total, dA, bits)
    if dx is not None:
        dx.copy_(total)
    if dgates is not None:
        owned = perm[: offsets[-1]].long()
        dc[owned] += scale.repeat_interleave(offsets.diff()) * e[0, owned]
        dgates.copy_(dc.view(dgates.shape))


def _experts(weight, offsets, perm):
    """(expert, its positions) for every expert that has any."""
    bounds, perm = offsets[:: (len(offsets) - 1) // len(weight)].tolist(), perm.long()
    for e in range(len(weight)):
        if bounds[e] < bounds[e + 1]:
            yield e, perm[bounds[e] : bounds[e + 1]]


def _rows(places, tensor, perm):
    return places // (len(perm) // len(tensor))


def _with_none(weight, *vectors):
    """Lists of one vector each, a zero behind the adapters of every expert."""
    return [[F.pad(v.view(len(weight), -1), (0, 1)).reshape(-1)] for v in vectors]
