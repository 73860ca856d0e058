"""Keep bits of every position p of adapter i, in position order: bit l of byte b = column 8 b + l is kept.

Row j of an adapter's own order takes the mask of philox.keep_mask with uid j. Zeros where no adapter is and right of the
last column.
"""

import torch

from .philox import keep_mask, pack_bits


def lora_dropout_mask(threshold, seeds, offsets, perm, tiles, step, site, n_cols):
    bits, bounds, perm = torch.zeros(len(perm), -(-n_cols // 8), dtype=torch.uint8, device=perm.device), offsets.tolist(), perm.long()
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        bits[perm[begin:end]] = pack_bits(keep_mask(end - begin, n_cols, int(threshold[i]), int(seeds[i]), step, site, perm.device))
    return bits
