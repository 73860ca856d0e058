"""Batched heterogeneous LoRA: one bank's table for the launches of lora_shrink.py and lora_expand.py together.

With one adapter a row, forward is two launches and backward three, whatever the number of targets and adapters and the
mix of ranks; with K, another K - 1 on the rows of y and of dx.
"""

import torch

from ._lora import bank_of
from .lora_base import fuses, lora_base_dx, lora_base_linear, lora_linear_bwd, lora_linear_fwd
from .lora_expand import launch_ds_and_grad_b, launch_expand
from .lora_shrink import launch_finish, launch_grad_a, launch_shrink, new_partial, new_s

__all__ = ["fuses", "lora_base_dx", "lora_base_linear", "lora_bwd", "lora_fwd", "lora_linear_bwd", "lora_linear_fwd"]


def lora_fwd(x, A, B, bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, sites, dropout, ys, bits=None):
    """Adds to ys and returns S; fills the keep bits, if given."""
    with torch.cuda.device_of(x):
        bank = bank_of(len(ys), A, B, bias, scale, threshold, seeds, sites)
        s = new_s(bank, x, perm, A)
        launch_shrink(bank, x, offsets, perm, tiles, step, dropout, s, bits)
        launch_expand(bank, s, gates, offsets, perm, tiles, ys)
    return s


def lora_bwd(
    dys, x, s, A, B, bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, sites, dropout, dx, e, dA, dB, dbias, bits=None
):
    """dx (or None) is added to, e (or None) and the gradients are written; x is read only for a dA that is wanted; bits: keep bits of the forward.

    Returns dS: whoever passes no dx has M o (dS A) left to add.
    """
    plan = offsets, perm, tiles
    with torch.cuda.device_of(s):
        bank = bank_of(len(dys), A, B, bias, scale, threshold, seeds, sites, dA, dB, dbias)
        partial, ds = new_partial(bank, perm), torch.empty_like(s)
        launch_ds_and_grad_b(bank, dys, s, gates, *plan, ds, e, partial)
        launch_grad_a(bank, ds, x, *plan, step, dropout, partial, bits)
        launch_finish(bank, ds, len(x), *plan, step, dropout, dx, partial, bits)
    return ds
