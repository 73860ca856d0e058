"""Batched heterogeneous LoRA: per adapter i with rows R_i,

    Xd = M o X[R_i]      S = Xd A_i^T      Y[R_i] += s_i (S B_i^T + beta_i)
    dS = s_i dY B_i      dA_i = dS^T Xd    dB_i = s_i dY^T S    dbeta_i = s_i sum dY    dX[R_i] += M o (dS A_i)
"""

import torch

from .philox import keep_mask


def lora_fwd(x, A, B, bias, scale, threshold, seeds, offsets, perm, tiles, step, site, dropout, y):
    compute = torch.promote_types(x.dtype, A[0].dtype) if A else x.dtype
    s = x.new_zeros(len(x), max((a.shape[0] for a in A), default=0), dtype=compute)
    for i, rows, span in _groups(offsets, perm):
        m = _multiplier(len(rows), x, i, threshold, seeds, step, site, dropout)
        s_i = _wide(x)[rows] * m @ _wide(A[i]).T
        delta = s_i @ _wide(B[i]).T
        if bias and bias[i].numel():
            delta = delta + _wide(bias[i])
        y[rows] = (_wide(y)[rows] + scale[i].to(delta.dtype) * delta).to(y.dtype)
        s[span, : A[i].shape[0]] = s_i.to(compute)
    return s


def lora_bwd(dy, x, s, A, B, bias, scale, threshold, seeds, offsets, perm, tiles, step, site, dropout, dx, need_factors):
    dA, dB, dbias = ([torch.zeros_like(t) for t in ts] for ts in (A, B, bias))
    for i, rows, span in _groups(offsets, perm):
        m = _multiplier(len(rows), x, i, threshold, seeds, step, site, dropout)
        dy_i = _wide(dy)[rows] * scale[i].to(_wide(dy).dtype)
        dS = dy_i @ _wide(B[i])
        if dx is not None:
            dx[rows] = (_wide(dx)[rows] + m * (dS @ _wide(A[i]))).to(dx.dtype)
        if need_factors:
            dA[i] = (dS.T @ (_wide(x)[rows] * m)).to(A[i].dtype)
            dB[i] = (dy_i.T @ _wide(s)[span, : A[i].shape[0]]).to(B[i].dtype)
            if bias and bias[i].numel():
                dbias[i] = dy_i.sum(0).to(bias[i].dtype)
    return [*dA, *dB, *dbias] if need_factors else []


def _wide(t):
    return t if t.dtype == torch.float64 else t.float()


def _groups(offsets, perm):
    bounds, perm = offsets.tolist(), perm.long()
    for i, (lo, hi) in enumerate(zip(bounds, bounds[1:])):
        if hi > lo:
            yield i, perm[lo:hi], slice(lo, hi)


def _multiplier(n_rows, x, i, threshold, seeds, step, site, dropout):
    """M: keep mask times 65536 / (65536 - threshold), exactly matching the quantised probability."""
    t = int(threshold[i])
    if not dropout or t == 0:
        return 1.0
    keep = keep_mask(n_rows, x.shape[1], t, int(seeds[i]), step, site, x.device)
    return keep.to(_wide(x).dtype) * (65536 / (65536 - t) if t < 65536 else 0.0)
