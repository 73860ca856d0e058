"""csrc/cuda/lora_dropout_mask_op.cpp for the emulator."""

import torch

from ...plan import TILE_ROWS
from . import launch, output

TILE = 32


def lora_dropout_mask(threshold, seeds, offsets, perm, tiles, step, site, n_cols):
    n, n_positions = threshold.numel(), perm.numel()
    bits, n_tiles = output((n_positions, -(-n_cols // 8)), torch.uint8), -(-n_positions // TILE) + n + 1
    plan = offsets, perm, tiles[TILE_ROWS.index(TILE)]
    launch("lora_dropout_mask", "lora_dropout_mask", threshold, seeds, *plan, step, site, n_cols, n_positions, n, n_tiles, bits, None)
    return bits
