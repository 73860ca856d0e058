"""Philox4x32 (Salmon et al., SC 2011) in torch integers, and the dropout mask every backend must reproduce bit for bit."""

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mul_hi_lo(a, m):
    # 32x32 -> 64 bits without leaving int64: a = hi * 2^16 + lo
    hi, lo = a >> 16, a & 0xFFFF
    return ((hi * m + ((lo * m) >> 16)) >> 16) & _MASK, (a * m) & _MASK


def philox4x32(counter, key, rounds=7):
    """counter: 4 int64 tensors with values in [0, 2^32); key: 2 ints or tensors. Returns 4 int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def keep_mask(n_rows, n_cols, threshold, seed, step, site, device):
    """Keep mask [n_rows, n_cols] of one adapter: row = ordinal in the adapter, keep iff its 16-bit lane >= threshold."""
    n_blocks = -(-n_cols // 8)
    block = torch.arange(n_blocks, device=device).expand(n_rows, n_blocks)
    row = torch.arange(n_rows, device=device)[:, None].expand(n_rows, n_blocks)
    words = philox4x32((block, row, torch.full_like(block, site & _MASK), (step & _MASK).expand_as(block)), (seed & _MASK, (seed >> 32) & _MASK))
    lanes = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], dim=-1)
    return lanes.reshape(n_rows, n_blocks * 8)[:, :n_cols] >= threshold


def pack_bits(keep):
    """uint8 [rows, ceil(columns / 8)]: bit l of byte b is column 8 b + l; zeros right of the last."""
    octets = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8)).unflatten(1, (-(-keep.shape[1] // 8), 8))
    return (octets << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits, n_cols):
    """What pack_bits packed: bool [rows, n_cols]."""
    octets = bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return octets.flatten(1)[:, :n_cols].bool()
