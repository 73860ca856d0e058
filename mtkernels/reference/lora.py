"""Batched heterogeneous LoRA: lora_shrink into rank space, lora_expand out of it, beside a linear layer of any kind."""

from .lora_expand import lora_expand_bwd, lora_expand_fwd
from .lora_shrink import lora_shrink_bwd, lora_shrink_fwd


def lora_fwd(x, A, B, bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, sites, dropout, ys, bits=None):
    s = lora_shrink_fwd(x, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, bits)
    lora_expand_fwd(s, B, bias, scale, gates, offsets, perm, tiles, ys)
    return s


def lora_bwd(dys, x, s, A, B, bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, sites, dropout, dx, e, dA, dB, dbias, bits=None):
    """x is read only for a dA that is wanted; bits as in lora_shrink."""
    ds = s.new_empty(s.shape)
    lora_expand_bwd(dys, s, B, bias, scale, gates, offsets, perm, tiles, ds, e, dB, dbias)
    lora_shrink_bwd(ds, x, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, dx, dA, bits)
