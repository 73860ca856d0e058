"""csrc/cuda/task_reduce_op.cpp for the emulator."""

import torch

from ...plan import TILE_ROWS
from . import element, launch, output, scratch

CHUNK_ROWS = 1024


def task_reduce_fwd(values, coef, offsets, perm, tiles):
    n_rows, n_tasks = values.numel(), offsets.numel() - 1
    n_partial = -(-n_rows // CHUNK_ROWS) + n_tasks
    partial, sums = scratch((n_partial,), torch.float32), output((n_tasks,), torch.float32)
    chunk_tiles = tiles[TILE_ROWS.index(CHUNK_ROWS)]
    launch("task_reduce", "task_reduce_fwd", element(values), values, coef, offsets, perm, chunk_tiles, n_rows, n_tasks, partial, n_partial, sums, None)
    return sums


def task_reduce_bwd(dsums, values, coef, ids):
    n_rows, n_tasks = values.numel(), dsums.numel()
    dvalues, dcoef = output((n_rows,), values.dtype), output((0 if coef is None else n_rows,), torch.float32)
    launch("task_reduce", "task_reduce_bwd", element(values), dsums, values, coef, ids, n_rows, n_tasks, dvalues, dcoef, None)
    return dvalues, dcoef
