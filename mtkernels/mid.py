"""Maps in rank space, for lora_linear(..., mid=) and lora_delta(..., mid=): y = base + B mid(A x).

A mid is called with s [T, R] (or [T, K, R], as the plan's ids), the bank and the plan; it returns (u, bank, plan, gates)
for lora_expand(u, bank, plan, gates=gates). Everything here is plain torch on rank-space rows or one of our ops, so
autograd reaches every argument, and a row's bits depend on its own adapters only. Write your own the same way.

    MTL-LoRA        lora_linear(x, W, b, shared, everyone, mid=chain(matrix(Lambda, tasks), bcast(bank, w[task_ids])))
    HydraLoRA       lora_linear(x, W, b, shared, everyone, mid=bcast(bank, softmax(router(x))))
    MoSLD           the same with weights that are zero outside the top-k, or with `ids` of the top-k
    Poly, MHR       lora_linear(x, W, b, skills, everyone_all, mid=pool_bcast(w[task_ids]))
    SMoRA           lora_linear(x, W, b, bank, plan, mid=diag(rank_gates))
    adapters        lora_delta(h, bank, plan, out=h, mid=act("relu", down_bias))

Sources: MTL-LoRA arXiv 2410.09437, HydraLoRA arXiv 2404.19245, MoSLD arXiv 2412.08946, Poly arXiv 2202.13914, MHR arXiv
2211.03831, SMoRA arXiv 2501.15103, adapters arXiv 1902.00751.
"""

import torch
import torch.nn.functional as F

from .bank import LoraBank
from .ops import group_plan, lora_shrink

_ACTS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda s: F.gelu(s, approximate="tanh"), "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def identity():
    """u = s."""
    return lambda s, bank, plan: (s, bank, plan, None)


def diag(d):
    """u = d o s. d: a list of [R_i], one per adapter, or rank gates as s, [T, R] or [T, K, R]."""

    def apply(s, bank, plan):
        if isinstance(d, torch.Tensor):
            if d.shape != s.shape:
                raise ValueError(f"mid.diag: d is {tuple(d.shape)}, s is {tuple(s.shape)}; give rank gates of that shape, or a list of one [R_i] per adapter")
            return s * d, bank, plan, None
        return s * _rows_of("mid.diag", d, bank, plan, s), bank, plan, None

    return apply


def act(kind, bias=None):
    """u = f(s + bias): bottleneck adapters. kind: relu, gelu, gelu_tanh, silu, tanh or sigmoid; bias: a list of [R_i] or None.

    Rank-space columns beyond an adapter's own rank are never read, so f(0) != 0 does no harm.
    """
    if kind not in _ACTS:
        raise ValueError(f"mid.act: {kind!r} is not one of {', '.join(_ACTS)}")

    def apply(s, bank, plan):
        return _ACTS[kind](s if bias is None else s + _rows_of("mid.act", bias, bank, plan, s)), bank, plan, None

    return apply


def matrix(maps, plan=None, bank=None):
    """u = M_i s with a small matrix per group: maps is a list of [R', R], one per group of `plan` (None: the call's own plan).

    plan: GroupPlan with one id per position of s, for example the tasks of MTL-LoRA. bank: what expands u, needed when
    R' differs from R.
    """
    maps = list(maps)
    square = LoraBank.from_factors(maps, [m.new_empty(0, m.shape[0]) for m in maps], 1.0, seeds=[0] * len(maps))

    def apply(s, own_bank, own_plan):
        groups = own_plan if plan is None else plan
        if square.in_features != s.shape[-1]:
            raise ValueError(f"mid.matrix: maps take {square.in_features} columns, s has {s.shape[-1]} (the largest rank of the bank)")
        flat = s.reshape(-1, s.shape[-1])
        if groups is own_plan and s.dim() == 3:
            groups = group_plan(own_plan.ids, own_plan.n_groups, step=0)
        u = lora_shrink(flat.to(square.dtype), square, groups, training=False)
        return u.view(*s.shape[:-1], u.shape[-1]), own_bank if bank is None else bank, own_plan, None

    return apply


def bcast(bank, weights, ids=None, plan=None):
    """sum_e w_e B_e s: one shared s [T, R] goes through several B. weights [T, E], differentiable.

    bank: LoraBank of the E up-projections (its A is not read). ids [T, E]: which of them each weight belongs to, for
    example the top-k of a router; None: all len(bank), in order. plan: group_plan(ids, len(bank)) if you have it.
    """

    def apply(s, _, own_plan):
        if s.dim() != 2 or weights.shape[0] != s.shape[0]:
            raise ValueError(f"mid.bcast: s is {tuple(s.shape)}, weights are {tuple(weights.shape)}; one shared s [T, R] and weights [T, E] go together")
        groups = _slots(weights, ids, plan, len(bank))
        u = s[:, None, : max(bank.ranks)].expand(-1, weights.shape[1], -1)
        return u, bank, groups, weights * (own_plan.ids >= 0)[:, None]

    return apply


def pool_bcast(weights, bank=None):
    """z = sum_e w_e s_e, then sum_e w_e B_e z: skills mixed as parameters, without a matrix per row. weights [T, E].

    The call's plan has ids [T, E] (all skills for every row); bank: another one to expand with, None = the call's own.
    """

    def apply(s, own_bank, plan):
        if s.dim() != 3 or weights.shape != s.shape[:2]:
            raise ValueError(f"mid.pool_bcast: s is {tuple(s.shape)}, weights are {tuple(weights.shape)}; the plan needs ids [T, E], the weights are [T, E]")
        z = (weights[..., None] * s).sum(1, keepdim=True)
        return z.to(s.dtype).expand(-1, s.shape[1], -1), own_bank if bank is None else bank, plan, weights

    return apply


def chain(*mids):
    """One mid after another; only the last may give gates."""

    def apply(s, bank, plan):
        gates = None
        for mid in mids:
            if gates is not None:
                raise ValueError("mid.chain: only the last map may weight its outputs (bcast, pool_bcast)")
            s, bank, plan, gates = mid(s, bank, plan)
        return s, bank, plan, gates

    return apply


def _slots(weights, ids, plan, n_groups):
    if plan is not None:
        return plan
    if ids is None:
        if weights.shape[1] != n_groups:
            raise ValueError(f"mid.bcast: weights are {tuple(weights.shape)} for {n_groups} up-projections; give one each, or their ids")
        ids = torch.arange(n_groups, device=weights.device).expand(weights.shape)
    return group_plan(ids, n_groups, step=0)


def _rows_of(op, vectors, bank, plan, s):
    """vectors[i], padded with zeros, for every position of s."""
    width = s.shape[-1]
    if len(vectors) != len(bank) or any(v.shape != (r,) for v, r in zip(vectors, bank.ranks)):
        raise ValueError(f"{op}: got {[tuple(v.shape) for v in vectors]} for ranks {bank.ranks}; give one [R_i] per adapter")
    table = torch.stack([F.pad(v, (0, width - len(v))) for v in vectors] + [s.new_zeros(width)])
    return table[plan.ids.long().where(plan.ids >= 0, len(vectors))].view(s.shape)
