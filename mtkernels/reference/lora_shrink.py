"""Into rank space, per target g and adapter i with positions P_i: S_g[P_i] = (M_g o x[row]) A_gi^T

    dA_gi = dS_g^T (M_g o x[row])      dx[row] += M_g o (dS_g A_gi)

Position p = t K + k belongs to row t; S [P, sum of widths] holds the targets side by side, each as wide as its widest A.
A lists the factors target by target. Gradients go into the tensors given; an empty one is a gradient nobody wants.
bits: uint8 [P, targets, ceil(D / 8)] that the forward fills with the keep bits of lora_dropout_mask (zeros also for an adapter
of rank 0) and the backward reads in place of Philox; None = the mask is drawn again.
"""

import torch

from .philox import keep_mask, pack_bits, unpack_bits


def lora_shrink_fwd(x, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, bits=None):
    s = x.new_zeros(len(perm), sum(widths(A, len(sites), 0)), dtype=compute_dtype(x, A))
    if bits is not None:
        bits.zero_()
    for g, i, places, rows, columns, factor in pieces(A, 0, len(sites), offsets, perm, len(x)):
        if bits is not None and len(factor):
            bits[places, g] = pack_bits(_keep(len(rows), x, i, threshold[g], seeds[g], step, sites[g]))
        m = _multiplier(len(rows), x, i, threshold[g], seeds[g], step, sites[g], dropout)
        s[places, columns] = (wide(x)[rows] * m @ wide(factor).T).to(s.dtype)
    return s


def lora_shrink_bwd(ds, x, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, dx, dA, bits=None):
    total = None if dx is None else wide(dx).clone()
    zero(dA)
    for g, i, places, rows, columns, factor in pieces(A, 0, len(sites), offsets, perm, len(x)):
        stored = None if bits is None else bits[places, g]
        m = _multiplier(len(rows), x, i, threshold[g], seeds[g], step, sites[g], dropout, stored)
        grad = dA[g * (len(offsets) - 1) + i]
        if grad.numel():
            grad.copy_(wide(ds)[places, columns].T @ (wide(x)[rows] * m))
        if dx is not None:
            total.index_add_(0, rows, m * (wide(ds)[places, columns] @ wide(factor)))
    if dx is not None:
        dx.copy_(total)


def wide(t):
    return t if t.dtype == torch.float64 else t.float()


def zero(tensors):
    for t in tensors:
        t.zero_()


def compute_dtype(x, factors):
    return torch.promote_types(x.dtype, factors[0].dtype)


def widths(factors, n_targets, rank_dim):
    """Columns of S that each target takes: its largest rank."""
    n = len(factors) // n_targets
    return [max(f.shape[rank_dim] for f in factors[g * n : (g + 1) * n]) for g in range(n_targets)]


def pieces(factors, rank_dim, n_targets, offsets, perm, n_rows):
    """(target, adapter, its positions, their rows, its columns of S, factor) for every adapter that has positions."""
    n, bounds, perm, begin = len(factors) // n_targets, offsets.tolist(), perm.long(), 0
    n_slots = len(perm) // n_rows if n_rows else 1
    for g, width in enumerate(widths(factors, n_targets, rank_dim)):
        for i in range(n):
            factor, places = factors[g * n + i], perm[bounds[i] : bounds[i + 1]]
            if len(places):
                yield g, i, places, places // n_slots, slice(begin, begin + factor.shape[rank_dim]), factor
        begin += width


def _keep(n, x, i, threshold, seeds, step, site):
    return keep_mask(n, x.shape[1], int(threshold[i]), int(seeds[i]), step, site, x.device)


def _multiplier(n, x, i, threshold, seeds, step, site, dropout, stored=None):
    """M: keep mask times 65536 / (65536 - threshold), exactly matching the quantised probability; uid = ordinal in the adapter."""
    t = int(threshold[i])
    if not dropout or t == 0:
        return 1.0
    keep = _keep(n, x, i, threshold, seeds, step, site) if stored is None else unpack_bits(stored, x.shape[1])
    return keep.to(wide(x).dtype) * (65536 / (65536 - t) if t < 65536 else 0.0)
