"""TaskLoss: per-task cross entropy behind transformers' loss_function signature."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..ops import group_plan, task_cross_entropy, task_reduce
from ..ops.task_cross_entropy import REDUCTIONS

_MISSING = (
    "TaskLoss: task_ids did not arrive. Call model(**batch, task_ids=ids). With transformers' Trainer set "
    "TrainingArguments(remove_unused_columns=False): by default it drops the task_ids column without a word. A model whose "
    "forward hands no extra arguments to its loss (sequence and token classification) needs loss(outputs.logits, labels, task_ids=ids)"
)


class TaskStats(NamedTuple):
    """One call, detached, on the device. losses [J]; counts [J] int64: valid rows; accuracy [J]: share of rows whose argmax is the label, or None."""

    losses: torch.Tensor
    counts: torch.Tensor
    accuracy: torch.Tensor | None


class TaskLoss:
    """Cross entropy by task: scalar = sum_j w_j L_j for the trainer, every L_j in `.last`.

    model.loss_function = TaskLoss(n_tasks=8); loss = model(**batch, task_ids=task_ids).loss

    n_tasks: J. weights: J numbers or a tensor [J] (default ones; a tensor is used as it is, so it may be trained).
    reduction: "token_mean" (L_j = mean over task j's valid rows) or "sum". ignore_index: label that counts nowhere.
    shift: [B, S, V] logits predict the next token's label, as in ForCausalLMLoss (default); False for token
        classification and masked language models. Logits [B, C] and [T, V] are never shifted.
    accuracy: also compute `.last.accuracy`, which reads the logits once more.

    A callable and not an nn.Module: transformers' loss_function is a property, and assigning a module to it would
    register a child and leave the model on its own loss.
    """

    def __init__(self, n_tasks, weights=None, reduction="token_mean", ignore_index=-100, *, shift=True, accuracy=True):
        if not isinstance(n_tasks, int) or n_tasks < 1:
            raise ValueError(f"TaskLoss: n_tasks is {n_tasks!r}; give an int >= 1")
        if reduction not in REDUCTIONS:
            raise ValueError(f"TaskLoss: reduction is {reduction!r}; give one of {', '.join(REDUCTIONS)}")
        if weights is not None:
            weights = torch.as_tensor(weights, dtype=torch.float32)
            if weights.shape != (n_tasks,):
                raise ValueError(f"TaskLoss: weights are {tuple(weights.shape)}; give one per task [{n_tasks}]")
        self.n_tasks, self.weights, self.reduction = n_tasks, weights, reduction
        self.ignore_index, self.shift, self.accuracy = ignore_index, shift, accuracy
        self.last = None

    def __repr__(self):
        return f"TaskLoss(n_tasks={self.n_tasks}, reduction={self.reduction!r}, shift={self.shift})"

    def __call__(self, logits, labels, vocab_size=None, num_items_in_batch=None, ignore_index=None, shift_labels=None, task_ids=None, **kwargs):
        """The loss of one batch, float32 [].

        logits: [B, S, V], [B, C] or [T, V]. labels: int, the shape of logits without the last. shift_labels: labels that
            already stand beside the logits that predict them. task_ids: int, one per row of the batch or per label, -1 = no
            task; ids per token are shifted with the labels (with shift_labels they stand where those stand).
        num_items_in_batch: divides the weighted sums instead of each task's own count, as with gradient accumulation.
        kwargs: pooled_logits (sequence classification) replaces logits; vocab_size and others are ignored.
        """
        if task_ids is None:
            raise ValueError(_MISSING)
        if kwargs.get("pooled_logits") is not None:
            logits = kwargs["pooled_logits"]
        ignore_index = self.ignore_index if ignore_index is None else ignore_index
        target, task_ids = self._rows(logits, labels, shift_labels, task_ids, ignore_index)
        logits = logits.reshape(-1, logits.shape[-1])
        plan = group_plan(task_ids, self.n_tasks, step=0)
        out = task_cross_entropy(logits, target, task_ids, self.n_tasks, self.reduction, ignore_index=ignore_index, plan=plan)
        self.last = self._stats(out, logits.detach(), target, task_ids, plan, ignore_index)
        if num_items_in_batch is None:
            return self._weighted(out.losses)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        return self._weighted(out.sums) / num_items_in_batch

    def _rows(self, logits, labels, shift_labels, task_ids, ignore_index):
        """One target and one task id per row of the flattened logits."""
        shape, target = logits.shape[:-1], labels if shift_labels is None else shift_labels
        target, task_ids = target.to(logits.device), task_ids.to(logits.device)
        if target.shape != shape:
            raise ValueError(f"TaskLoss: labels are {tuple(target.shape)} for logits {tuple(logits.shape)}; give {tuple(shape)}")
        per_row = task_ids.shape == shape
        if not per_row and task_ids.shape != shape[:1]:
            raise ValueError(f"TaskLoss: task_ids are {tuple(task_ids.shape)} for logits {tuple(logits.shape)}; give {tuple(shape[:1])} or {tuple(shape)}")
        if not per_row:
            task_ids = task_ids.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)
        if self.shift and shift_labels is None and len(shape) > 1:
            target = F.pad(target, (0, 1), value=ignore_index)[..., 1:]
            task_ids = F.pad(task_ids, (0, 1), value=-1)[..., 1:] if per_row else task_ids
        return target.reshape(-1), task_ids.reshape(-1)

    def _weighted(self, per_task):
        if self.weights is None:
            return per_task.sum()
        return (per_task * self.weights.to(per_task.device)).sum()

    @torch.no_grad()
    def _stats(self, out, logits, target, task_ids, plan, ignore_index):
        accuracy = None
        if self.accuracy:
            right = (logits.argmax(-1) == target) & (target != ignore_index)
            accuracy = task_reduce(right.to(torch.float32), task_ids, self.n_tasks, plan=plan) / out.counts.clamp(min=1)
        return TaskStats(out.losses.detach(), out.counts, accuracy)
