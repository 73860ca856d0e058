"""task_reduce: sums of per-row values by task.

Formula    sums[j] = sum over rows t of task j of coef[t] values[t]
Shapes     values [T], coef [T] or None, task_ids [T] int32/int64 (-1 = no task) -> sums [J] float32
Gradients  values: g[task] coef; coef: g[task] values
Backends   reference, cpu, triton, cuda
Cost       reads values and coef once; chunks of 1024 rows counted from the task's own first row, summed in order, so a
           task's bits do not depend on the other tasks in the batch

    sums = task_reduce(values, task_ids, n_tasks=8)
"""

import torch

from .. import _backends
from .._op import below_autograd, register
from ..plan import check_plan
from .group_plan import group_plan


def _kernel(values, coef, ids, offsets, perm, tiles, backend):
    return _backends.launchers("task_reduce", values, backend).task_reduce_fwd(values, coef, offsets, perm, tiles)


def _bwd_kernel(dsums, values, coef, ids, backend):
    return _backends.launchers("task_reduce", values, backend).task_reduce_bwd(dsums, values, coef, ids)


def _sums_dtype(values):
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _fake(values, coef, ids, offsets, perm, tiles, backend):
    return values.new_empty(offsets.shape[0] - 1, dtype=_sums_dtype(values))


def _bwd_fake(dsums, values, coef, ids, backend):
    return torch.empty_like(values), dsums.new_empty(0 if coef is None else values.shape[0])


class _TaskReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, coef, ids, offsets, perm, tiles, backend):
        ctx.backend, ctx.dtype = backend, values.dtype
        ctx.save_for_backward(ids, *([] if coef is None else [coef]), *([values] if ctx.needs_input_grad[1] else []))
        with below_autograd():
            return _op(values, coef, ids, offsets, perm, tiles, backend)

    @staticmethod
    def backward(ctx, dsums):
        ids, coef, values = (*ctx.saved_tensors, None, None)[:3]
        if values is None:  # only the gradient of coef reads them
            values = dsums.new_empty(ids.shape, dtype=ctx.dtype)
        dvalues, dcoef = _bwd_op(dsums.contiguous(), values, coef, ids, ctx.backend)
        return dvalues, dcoef if ctx.needs_input_grad[1] else None, *(None,) * 5


_op = register(
    "task_reduce",
    "task_reduce(Tensor values, Tensor? coef, Tensor ids, Tensor offsets, Tensor perm, Tensor tiles, str backend) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    autograd=_TaskReduce.apply,
)
_bwd_op = register(
    "task_reduce",
    "task_reduce_bwd(Tensor dsums, Tensor values, Tensor? coef, Tensor ids, str backend) -> (Tensor dvalues, Tensor dcoef)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)


def task_reduce(values, task_ids, n_tasks, coef=None, *, plan=None, backend=None):
    """sums [J] float32 of coef[t] * values[t] over each task's rows; a task without rows gets exactly 0.

    values: [T] float32/bfloat16/float16 (float64 on the reference). task_ids: [T] int32/int64 in [-1, n_tasks), -1 = no
    task. coef: [T] of any floating-point dtype, or None for ones. plan: group_plan(task_ids, n_tasks) if you have it.
    """
    check_rows("task_reduce", "values", values)
    plan = task_plan("task_reduce", values, task_ids, n_tasks, plan, backend)
    if coef is not None:
        check_rows("task_reduce", "coef", coef)
        if coef.shape != values.shape or coef.device != values.device:
            raise ValueError(f"task_reduce: coef is {tuple(coef.shape)} on {coef.device}; give one per value, {tuple(values.shape)} on {values.device}")
        coef = coef.to(_sums_dtype(values)).contiguous()
    return _op(values.contiguous(), coef, plan.ids, plan.offsets, plan.perm, plan.tiles, _backends.requested(backend))


def check_rows(op, name, t):
    if not isinstance(t, torch.Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
        raise TypeError(f"{op}: {name} is {got}; give a floating-point tensor")
    if t.dim() != 1:
        raise ValueError(f"{op}: {name} is {tuple(t.shape)}; give one value per row [T]")


def task_plan(op, rows, task_ids, n_tasks, plan, backend=None):
    """The plan of the rows' tasks, built from task_ids unless the caller brings it."""
    if plan is None:
        if not isinstance(task_ids, torch.Tensor) or task_ids.shape != rows.shape[:1] or task_ids.device != rows.device:
            got = f"{tuple(task_ids.shape)} on {task_ids.device}" if isinstance(task_ids, torch.Tensor) else type(task_ids).__name__
            raise ValueError(f"{op}: task_ids are {got}; give one id per row {tuple(rows.shape[:1])} on {rows.device}")
        return group_plan(task_ids, n_tasks, step=0, backend=_backends.or_automatic("group_plan", backend, task_ids))
    check_plan(op, plan, n_tasks, rows.shape[0], rows.device, "tasks")
    return plan
