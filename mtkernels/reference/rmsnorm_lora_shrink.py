"""RMSNorm, and its result in rank space. Per row, with r = 1 / sqrt(mean(x^2) + eps), xhat = r x and w = offset + gamma:

    xn = w xhat      S_g[p] = (M_g o xn[row]) A_gi^T

    dxn' = dxn + sum over g and the row's positions of M_g o (dS_g A_gi)
    dgamma = sum over rows of dxn' o xhat      dx = r (w dxn' - xhat mean(w dxn' o xhat))      dA_gi = dS_g^T (M_g o xn)

r, w and all sums are float32. round_first rounds xhat to the dtype of x before w multiplies it (LlamaRMSNorm), otherwise
only the product is rounded (GemmaRMSNorm). S and dA see xn as rounded. Positions, targets, bits and empty gradients as in lora_shrink.
"""

from .lora_shrink import lora_shrink_bwd, lora_shrink_fwd, wide


def rmsnorm_lora_shrink_fwd(x, gamma, eps, offset, round_first, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, bits=None):
    """xn [T, D] in the dtype of x, s, and r [T] that backward takes."""
    rstd = (wide(x).square().mean(1) + eps).rsqrt()
    xn = normalize(x, gamma, rstd, offset, round_first)
    return xn, lora_shrink_fwd(xn, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, bits), rstd


def rmsnorm_lora_shrink_bwd(
    dxn, ds, x, gamma, rstd, s, offset, round_first, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, dx, dgamma, dA, bits=None
):
    """Writes dx and dgamma, unless None, and dA. s is there for kernels: sum(dxn' o xn) = sum(dxn o xn) + sum(dS o S)."""
    total = wide(dxn).clone()
    xn = normalize(x, gamma, rstd, offset, round_first)
    lora_shrink_bwd(ds, xn, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, total, dA, bits)
    xhat, w = wide(x) * rstd[:, None], offset + wide(gamma)
    if dx is not None:
        dx.copy_(rstd[:, None] * (w * total - xhat * (w * total * xhat).mean(1, keepdim=True)))
    if dgamma is not None:
        dgamma.copy_((total * (xhat.to(x.dtype) if round_first else xhat)).sum(0))


def normalize(x, gamma, rstd, offset, round_first):
    xhat = wide(x) * rstd[:, None]
    if round_first:
        xhat = wide(xhat.to(x.dtype))
    return ((offset + wide(gamma)) * xhat).to(x.dtype)
