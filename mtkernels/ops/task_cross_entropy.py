"""task_cross_entropy: per-task cross entropy from logits.

Formula    nll[t] = lse[t] - logits[t, target[t]];  L_j = sum over valid rows of task j of c[t] nll[t]
           token_mean: c = w[t] / n_j with n_j the task's valid rows; sum: c = w[t];  denominators=d: c = w[t] / d_j
Shapes     logits [T, V], target [T], task_ids [T] -> TaskLosses(losses [J], total [], counts [J], sums [J])
Gradients  logits and token_weight, from any upstream gradient per task
Backends   reference, cpu, triton. No CUDA C++: one pass over the logits is bandwidth-bound, Triton reaches it
Cost       reads logits once forward and once backward, writes dlogits; saved: logits and lse [T]

    out = task_cross_entropy(logits, target, task_ids, n_tasks=8); out.total.backward()
"""

from typing import NamedTuple

import torch

from .. import _backends
from .._op import below_autograd, register
from .task_reduce import task_plan, task_reduce

REDUCTIONS = ("token_mean", "sum")


class TaskLosses(NamedTuple):
    """losses [J]: per-task losses. total []: their weighted sum. counts [J] int64: valid rows. sums [J]: weighted nll sums."""

    losses: torch.Tensor
    total: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor


def _kernel(logits, target, ids, ignore_index, backend):
    if logits.device.type == "cpu":
        _check_targets(logits, target, ids, ignore_index)
    return _backends.launchers("task_cross_entropy", logits, backend).task_cross_entropy_fwd(logits, target, ids, ignore_index)


def _bwd_kernel(dnll, logits, target, ids, lse, ignore_index, backend):
    return _backends.launchers("task_cross_entropy", logits, backend).task_cross_entropy_bwd(dnll, logits, target, ids, lse, ignore_index)


def _fake(logits, target, ids, ignore_index, backend):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty(logits.shape[0], dtype=dtype)


def _bwd_fake(dnll, logits, target, ids, lse, ignore_index, backend):
    return logits.new_empty(logits.shape)


class _TaskCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, ids, ignore_index, backend):
        ctx.ignore_index, ctx.backend = ignore_index, backend
        with below_autograd():
            nll, lse = _op(logits, target, ids, ignore_index, backend)
        ctx.save_for_backward(logits, target, ids, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return nll, lse

    @staticmethod
    def backward(ctx, dnll, _):
        if dnll is None:
            return (None,) * 5
        dlogits = _bwd_op(dnll.contiguous(), *ctx.saved_tensors, ctx.ignore_index, ctx.backend)
        return dlogits, None, None, None, None


_op = register(
    "task_cross_entropy",
    "task_cross_entropy(Tensor logits, Tensor target, Tensor ids, int ignore_index, str backend) -> (Tensor nll, Tensor lse)",
    kernel=_kernel,
    fake=_fake,
    autograd=_TaskCrossEntropy.apply,
)
_bwd_op = register(
    "task_cross_entropy",
    "task_cross_entropy_bwd(Tensor dnll, Tensor logits, Tensor target, Tensor ids, Tensor lse, int ignore_index, str backend) -> Tensor",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)


def task_cross_entropy(
    logits, target, task_ids, n_tasks, reduction="token_mean", *, ignore_index=-100, token_weight=None, task_weights=None, denominators=None, plan=None, backend=None
):
    """Per-task cross entropy.

    logits: [T, V] float32/bfloat16/float16 (float64 on the reference), any row stride; -inf marks classes a task does
        not have. target: [T] int; ignore_index rows count nowhere; any other target outside [0, V) raises IndexError
        on CPU and gives a NaN loss of its task on a GPU. task_ids: [T] int32/int64 in [-1, n_tasks), -1 = no task.
    reduction: "token_mean" or "sum". token_weight: [T] multiplies each row's loss (the mean still divides by the
        number of valid rows). denominators: [J] divides each task's sum instead, e.g. counts of the global batch.
    task_weights: [J] weights of `total` (default ones). plan: group_plan(task_ids, n_tasks) if you have it.
    Returns TaskLosses in float32; a task without valid rows has loss 0 and count 0.
    """
    _check(logits, target, reduction, n_tasks, task_weights, denominators)
    plan = task_plan("task_cross_entropy", logits, task_ids, n_tasks, plan, backend)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    name = _backends.requested(backend)
    nll, _ = _op(logits, target.contiguous(), plan.ids, ignore_index, name)
    sums = task_reduce(nll, task_ids, n_tasks, token_weight, plan=plan, backend=backend)
    counts = _valid_rows(target, plan, ignore_index)
    losses = _normalise(sums, counts, reduction, denominators)
    total = losses.sum() if task_weights is None else (losses * task_weights.to(losses.dtype)).sum()
    return TaskLosses(losses, total, counts, sums)


def _normalise(sums, counts, reduction, denominators):
    if denominators is not None:
        return sums / denominators.to(sums.dtype)
    return sums if reduction == "sum" else sums / counts.clamp(min=1)


def _valid_rows(target, plan, ignore_index):
    # integer adds commute, so this is deterministic on every device; the spare bin takes rows without task
    bins = torch.where(target == ignore_index, plan.n_groups, torch.where(plan.ids < 0, plan.n_groups, plan.ids).long())
    counts = torch.zeros(plan.n_groups + 1, dtype=torch.int64, device=target.device)
    return counts.index_add(0, bins, torch.ones_like(bins))[:-1]


def _check_targets(logits, target, ids, ignore_index):
    n_classes = logits.shape[1]
    bad = ((target < 0) | (target >= n_classes)) & (target != ignore_index) & (ids >= 0)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise IndexError(f"task_cross_entropy: target[{row}] is {int(target[row])}; give 0..{n_classes - 1} or ignore_index={ignore_index}")


def _check(logits, target, reduction, n_tasks, task_weights, denominators):
    op = "task_cross_entropy"
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise TypeError(f"{op}: logits are {getattr(logits, 'dtype', type(logits).__name__)}; give floating-point logits")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits are {tuple(logits.shape)}; give [T, V] with at least one class")
    if not isinstance(target, torch.Tensor) or target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: target is {getattr(target, 'dtype', type(target).__name__)}; give int32 or int64 class indices")
    if target.shape != logits.shape[:1] or target.device != logits.device:
        raise ValueError(f"{op}: target is {tuple(target.shape)} on {target.device}; logits {tuple(logits.shape)} on {logits.device} need one index per row")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; give one of {', '.join(REDUCTIONS)}")
    for name, t in (("task_weights", task_weights), ("denominators", denominators)):
        if t is not None and (t.shape != (n_tasks,) or t.device != logits.device):
            raise ValueError(f"{op}: {name} are {tuple(t.shape)} on {t.device}; give [{n_tasks}] on {logits.device}")
