"""Out of rank space, per target g and adapter i with positions P_i, gate c_p (1 without gates):

    y_g[row] += c_p s_gi (S_g B_gi^T + beta_gi)         e_gp = S_gp . (dy_g[row] B_gi) + dy_g[row] . beta_gi
    dS_g = c_p s_gi dy_g[row] B_gi                      dB_gi = sum_p c_p s_gi dy_g[row]^T S_gp      dbeta_gi = sum_p c_p s_gi dy_g[row]
    dc_p = sum_g s_gi e_gp                              ds_gi = sum_p c_p e_gp

B and bias list the factors target by target; bias is empty, or has an empty tensor for an adapter without one.
Positions, S and empty gradients as in lora_shrink. The last line is the caller's, from e.
"""

from .lora_shrink import pieces, wide, zero


def lora_expand_fwd(s, B, bias, scale, gates, offsets, perm, tiles, ys):
    totals = [wide(y).clone() for y in ys]
    for g, i, places, rows, columns, factor in pieces(B, 1, len(ys), offsets, perm, len(ys[0])):
        beta = _beta(bias, g * (len(offsets) - 1) + i)
        delta = wide(s)[places, columns] @ wide(factor).T + beta
        totals[g].index_add_(0, rows, _coefficient(scale[g][i], gates, places, delta) * delta)
    for y, total in zip(ys, totals):
        y.copy_(total)


def lora_expand_bwd(dys, s, B, bias, scale, gates, offsets, perm, tiles, ds, e, dB, dbias):
    """ds [P, widths] and e [targets, P] are written whole: zeros where no adapter is."""
    zero([*dB, *dbias, ds, *([] if e is None else [e])])
    for g, i, places, rows, columns, factor in pieces(B, 1, len(dys), offsets, perm, len(dys[0])):
        index = g * (len(offsets) - 1) + i
        dy, s_i = wide(dys[g])[rows], wide(s)[places, columns]
        d = dy @ wide(factor)
        c = _coefficient(scale[g][i], gates, places, dy)
        ds[places, columns] = (c * d).to(ds.dtype)
        if e is not None:
            e[g, places] = ((s_i * d).sum(1) + (dy * _beta(bias, index)).sum(1)).to(e.dtype)
        if dB[index].numel():
            dB[index].copy_((c * dy).T @ s_i)
        if dbias and dbias[index].numel():
            dbias[index].copy_((c * dy).sum(0))


def _beta(bias, index):
    return wide(bias[index]) if bias and bias[index].numel() else 0.0


def _coefficient(scale, gates, places, like):
    c = scale.to(like.dtype)
    return c if gates is None else c * gates[places, None].to(like.dtype)
