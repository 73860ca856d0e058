"""Rows grouped by an id: a stable sort."""

import torch

TILE_ROWS = (16, 32, 64, 128, 1024)


def group_plan(ids, n_groups):
    """ids [P], n_groups G -> ids32 [P], counts [G], offsets [G+1], perm [P], inv_perm [P], tiles [len(TILE_ROWS), G+1]."""
    ids = torch.where((ids >= 0) & (ids < n_groups), ids, -1).long()
    counts = torch.stack([(ids == g).sum() for g in range(n_groups)]) if n_groups else ids.new_zeros(0)
    perm = torch.where(ids < 0, n_groups, ids).sort(stable=True).indices
    inv_perm = torch.empty_like(perm)
    inv_perm[perm] = torch.arange(len(perm), device=ids.device)
    rows = torch.tensor(TILE_ROWS, device=ids.device)[:, None]
    tiles = _exclusive_cumsum((counts + rows - 1) // rows)
    return tuple(t.int() for t in (ids, counts, _exclusive_cumsum(counts), perm, inv_perm, tiles))


def _exclusive_cumsum(x):
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))
