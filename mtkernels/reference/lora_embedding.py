"""Rank-space rows of an embedding: S[p] = A_i[:, token[row]]^T for position p of adapter i, row = p // K

    dA_i[:, v] = sum of dS[p] over the positions of adapter i whose token is v, in ascending order; zero where there are none

A token outside the table has S = 0 and, like `padding`, no gradient. Positions and S as in lora_shrink.
"""

from .lora_shrink import pieces, wide, zero


def lora_embedding_fwd(token, A, ids, offsets, perm, tiles, s):
    """s [P, at least the largest rank] is written whole."""
    s.zero_()
    for _, _, places, rows, columns, factor in pieces(A, 0, 1, offsets, perm, len(token)):
        known = _inside(token[rows], factor)
        s[places[known], columns] = factor[:, token[rows[known]]].T.to(s.dtype)


def lora_embedding_bwd(ds, token, padding, ids, offsets, perm, tiles, dA):
    """dA is written; an empty one is a gradient nobody wants."""
    zero(dA)
    for _, i, places, rows, columns, _ in pieces(dA, 0, 1, offsets, perm, len(token)):
        if dA[i].numel():
            known = _inside(token[rows], dA[i]) & (token[rows] != padding)
            sums = wide(dA[i]).index_add(1, token[rows[known]], wide(ds)[places[known], columns].T.to(wide(dA[i]).dtype))
            dA[i].copy_(sums)


def _inside(token, factor):
    return (token >= 0) & (token < factor.shape[1])
