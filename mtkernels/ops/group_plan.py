"""group_plan: rows grouped by an id.

Formula    perm = stable argsort of ids; offsets = exclusive cumsum of counts; ids outside [0, G) are "no group" and sort last
Shapes     ids [T] or [T, K] int32/int64; P = T * K; results int32 (see GroupPlan)
Gradients  none
Backends   reference, cpu, triton. No CUDA C++: four small launches are bandwidth-trivial, Triton is enough
Cost       reads the ids twice, writes 3 P + O(G) int32; no host sync, no data-dependent shape

    plan = group_plan(adapter_ids, n_groups=4)
"""

import os

import torch

from .. import _backends
from .._op import register
from ..plan import TILE_ROWS, GroupPlan, as_step


def _kernel(ids, n_groups, check, backend):
    if check and (ids.device.type == "cpu" or os.environ.get("MTKERNELS_DEBUG") == "1"):
        _check_range(ids, n_groups)
    return _backends.launchers("group_plan", ids, backend).group_plan(ids, n_groups)


def _fake(ids, n_groups, check, backend):
    n_rows = ids.numel()
    sizes = (n_rows,), (n_groups,), (n_groups + 1,), (n_rows,), (n_rows,), (len(TILE_ROWS), n_groups + 1)
    return tuple(ids.new_empty(size, dtype=torch.int32) for size in sizes)


def _check_range(ids, n_groups):
    bad = (ids < -1) | (ids >= n_groups)
    if bad.any():
        where = int(bad.nonzero()[0, 0])
        raise IndexError(
            f"group_plan: ids[{where}] is {int(ids[where])}; ids are -1 (no group) or 0..{n_groups - 1} "
            f"({int(bad.sum())} of {ids.numel()} are not). Pass out_of_range='drop' to treat the others as no group"
        )


group_plan_op = register(
    "group_plan",
    "group_plan(Tensor ids, int n_groups, bool check, str backend) -> (Tensor ids, Tensor counts, Tensor offsets, Tensor perm, Tensor inv_perm, Tensor tiles)",
    kernel=_kernel,
    fake=_fake,
)


def group_plan(ids, n_groups, *, step=None, out_of_range="error", cu_seqlens=None, n_rows=None, backend=None):
    """Group rows by id, once per micro-batch; every layer and both passes reuse the plan.

    ids: [T] or [T, K] int32/int64, any order, -1 = no group. With cu_seqlens [B+1] (packed sequences), ids [B] holds
        one id per sequence and n_rows is the number of rows T (rows after cu_seqlens[-1] have no group).
    n_groups: number of groups G.
    step: dropout counter, int or int64 device scalar; None draws one from torch's generator.
    out_of_range: "error" raises IndexError on ids outside [-1, G) on CPU (on a GPU only with MTKERNELS_DEBUG=1,
        otherwise they count as no group); "drop" treats them as no group everywhere.
    Returns GroupPlan. Raises TypeError for other id dtypes, ValueError for other shapes.
    """
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"group_plan: ids are {got}; give an int32 or int64 tensor")
    if cu_seqlens is not None:
        ids = _per_row_ids(ids, cu_seqlens, n_rows)
    if ids.dim() not in (1, 2):
        raise ValueError(f"group_plan: ids are {tuple(ids.shape)}; give [T] or [T, K]")
    if not isinstance(n_groups, int) or n_groups < 0:
        raise ValueError(f"group_plan: n_groups is {n_groups!r}; give an int >= 0")
    if out_of_range not in ("error", "drop"):
        raise ValueError(f"group_plan: out_of_range is {out_of_range!r}; give 'error' or 'drop'")
    tensors = group_plan_op(ids.contiguous().view(-1), n_groups, out_of_range == "error", _backends.requested(backend))
    return GroupPlan(n_groups, ids.shape, *tensors, as_step(step, ids.device))


def _per_row_ids(ids, cu_seqlens, n_rows):
    if ids.dim() != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) != len(ids) + 1 or n_rows is None:
        raise ValueError(
            f"group_plan: with cu_seqlens {tuple(cu_seqlens.shape)} give one id per sequence "
            f"[{max(len(cu_seqlens) - 1, 0)}] and n_rows, got ids {tuple(ids.shape)}, n_rows={n_rows}"
        )
    rows = torch.arange(n_rows, device=ids.device)
    sequence = torch.bucketize(rows, cu_seqlens.long(), right=True) - 1
    padded = torch.nn.functional.pad(ids, (0, 1), value=-1)
    return torch.where(sequence < 0, -1, padded[sequence.clamp(min=0)])
