"""GroupPlan: which rows belong to which group, computed once per micro-batch and read by every kernel."""

from dataclasses import dataclass

import torch

TILE_ROWS = (16, 32, 64, 128, 1024)


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """Rows grouped by id. Build it with `group_plan`; every tensor is on the ids' device.

    shape: of the ids, [T] or [T, K]; P = T * K positions, G = n_groups.
    ids [P] int32: the group of each position, -1 for none. counts [G] int32. offsets [G+1] int32.
    perm [P] int32: positions sorted by group, stable, those without group last. inv_perm [P] int32: its inverse.
    tiles [5, G+1] int32: for each block height in TILE_ROWS, the number of row blocks before each group.
    step [] int64: the dropout counter; a recompute with the same plan replays the same masks.
    """

    n_groups: int
    shape: torch.Size
    ids: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    perm: torch.Tensor
    inv_perm: torch.Tensor
    tiles: torch.Tensor
    step: torch.Tensor

    @property
    def n_rows(self):
        return self.shape[0]

    @property
    def device(self):
        return self.ids.device

    def tensors(self):
        return (self.ids, self.counts, self.offsets, self.perm, self.inv_perm, self.tiles, self.step)

    def with_step(self, step):
        """The same groups with another dropout counter (int or int64 tensor), e.g. for the next optimizer step."""
        return GroupPlan(self.n_groups, self.shape, *self.tensors()[:-1], as_step(step, self.device))


def as_step(step, device):
    """A device int64 scalar; None draws one from torch's generator."""
    if step is None:
        return torch.randint(0, 2**31 - 1, (), device=device)
    if isinstance(step, torch.Tensor):
        if step.dtype != torch.int64 or step.numel() != 1 or step.device != device:
            raise ValueError(f"step is {step.dtype} {tuple(step.shape)} on {step.device}; give one int64 value on {device}")
        return step.reshape(())
    return torch.full((), step, dtype=torch.int64, device=device)


def check_plan(op, plan, n_groups, n_rows, device, groups="groups", slots=False):
    """Raise unless `plan` has n_groups groups over n_rows rows on `device`, with one id a row, or any number if `slots`."""
    if not isinstance(plan, GroupPlan):
        raise TypeError(f"{op}: plan is a {type(plan).__name__}; build one with group_plan(ids, n_groups)")
    if plan.n_groups != n_groups:
        raise ValueError(f"{op}: the plan has {plan.n_groups} groups, but there are {n_groups} {groups}")
    if len(plan.shape) != 1 and not slots:
        raise ValueError(f"{op}: the plan's ids are {tuple(plan.shape)}; one id per row [T] is supported here")
    if plan.n_rows != n_rows:
        raise ValueError(f"{op}: the plan covers {plan.n_rows} rows, but the input has {n_rows}")
    if plan.device != device:
        raise ValueError(f"{op}: the plan is on {plan.device}, the input on {device}; build it from ids on {device}")


def alora_ids(ids, offsets, length):
    """Per-token ids [B, length] for activated LoRA: a sequence's adapter starts at its invocation, rows before it have none.

    ids: [B] int32/int64, one adapter per sequence, -1 = none. offsets: [B] tensor, or a list of ints and Nones: tokens from
    the start of the invocation to the end of the sequence (PEFT's alora_offsets; None = not invoked); larger than
    `length` means from the first token. Feed the result, flattened, to `group_plan`, or to `adapters`.
    Source: Activated LoRA, arXiv 2504.12397.
    """
    if not isinstance(offsets, torch.Tensor):
        offsets = torch.tensor([0 if o is None else int(o) for o in offsets], dtype=torch.int64, device=ids.device)
    if ids.dim() != 1 or offsets.shape != ids.shape:
        raise ValueError(f"alora_ids: ids are {tuple(ids.shape)}, offsets {tuple(offsets.shape)}; give one of each per sequence [B]")
    active = torch.arange(length, device=ids.device) >= length - offsets[:, None]
    return torch.where(active, ids[:, None], -1)


def expert_adapter_ids(experts, adapters, n_adapters):
    """Ids for moe_lora_linear's plan: e (A + 1) + a for adapter a of expert e, and e (A + 1) + A for expert e without adapter.

    experts: [T, K] or [T] int32/int64, -1 = the position goes to no expert. adapters: [T], one for all experts of a row, or as
    experts; -1 = none. n_adapters: A, adapters of each expert. Returns int64 ids like experts, for group_plan(ids, E * (A + 1));
    an adapter outside [-1, A) gives an id outside the groups, which group_plan handles as its `out_of_range` says.
    """
    if adapters.shape not in (experts.shape, experts.shape[:1]):
        raise ValueError(
            f"expert_adapter_ids: adapters are {tuple(adapters.shape)} for experts {tuple(experts.shape)}; give one per row, or one per expert of a row"
        )
    if not isinstance(n_adapters, int) or n_adapters < 1:
        raise ValueError(f"expert_adapter_ids: n_adapters is {n_adapters!r}; give an int >= 1")
    experts, adapters = experts.long(), adapters.long().view(*adapters.shape, *(1,) * (experts.dim() - adapters.dim()))
    ids = experts * (n_adapters + 1) + torch.where(adapters == -1, n_adapters, adapters)
    known = (adapters >= -1) & (adapters < n_adapters)
    return torch.where(experts < 0, experts, torch.where(known, ids, torch.iinfo(torch.int32).max))
