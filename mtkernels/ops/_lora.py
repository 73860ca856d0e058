"""What the LoRA ops share: schema pieces, argument checks, factor views, and gradients of gates and scales."""

import torch

from .. import _backends
from ..bank import LAYOUTS, LoraBank, views_A, views_B
from ..plan import check_plan

# Target by target: params of A and of B, bias of every adapter (or none at all), scale/threshold/seeds [n].
BANK = "Tensor[] A, Tensor[] B, Tensor[] lora_bias, Tensor[] scale, Tensor[] threshold, Tensor[] seeds, int[] ranks, int[] layouts"
PLAN = "Tensor ids, Tensor offsets, Tensor perm, Tensor tiles, Tensor step"
# The argument `dropout` of the schemas is an index: no dropout, masks drawn again in backward, kept as bits, or one of the two.
DROPOUT_MODES = ("", "replay", "bitmask", "auto")
REPLAY, BITMASK, AUTO = 1, 2, 3
# Of the params that come before, or empty: gradients are then added to these.
MAIN_GRAD = "Tensor[] main_grad"
# What a shrink alone reads of its banks.
SHRINK = f"Tensor[] A, Tensor[] threshold, Tensor[] seeds, int[] ranks, int[] layouts, {PLAN}, int[] sites, int dropout"


def bank_args(op, banks):
    """The arguments of schema piece BANK."""
    _check_dtypes(op, banks)
    bias = [t for bank in banks for t in (bank.bias or [bank.params_A[0].new_empty(0)] * len(bank))] if any(bank.bias for bank in banks) else []
    return (
        [t for bank in banks for t in bank.params_A],
        [t for bank in banks for t in bank.params_B],
        bias,
        [bank.scale for bank in banks],
        [bank.threshold for bank in banks],
        [bank.seeds for bank in banks],
        [r for bank in banks for r in bank.ranks],
        [LAYOUTS.index(bank.layout) for bank in banks],
    )


def shrink_args(op, banks, plan, sites, training, mode):
    """The arguments of schema piece SHRINK."""
    _check_dtypes(op, banks)
    factors = [t for bank in banks for t in bank.params_A], [bank.threshold for bank in banks], [bank.seeds for bank in banks]
    layouts = [LAYOUTS.index(bank.layout) for bank in banks]
    dropout = dropout_arg(op, banks, training, mode)
    return *factors, [r for bank in banks for r in bank.ranks], layouts, *plan_args(plan), list(sites), dropout


def dropout_arg(op, banks, training, mode):
    """The argument `dropout`: 0 without dropout; nothing is kept where there is no backward."""
    if mode not in DROPOUT_MODES[1:]:
        raise ValueError(f"{op}: dropout_mode is {mode!r}; give 'replay' to draw masks again in backward, 'bitmask' to keep them as bits, or 'auto'")
    if not training or not any(bank.has_dropout for bank in banks):
        return 0
    return DROPOUT_MODES.index(mode) if torch.is_grad_enabled() else REPLAY


def keeps_bits(dropout, x, factor, backend):
    """Whether masks are kept as bits: if asked for, or, left open, if the kernels expect time from it on this device."""
    if dropout != AUTO or x.device.type not in ("cpu", "cuda"):
        return dropout == BITMASK
    run = launchers("lora_shrink", x, factor, backend)
    return hasattr(run, "prefers_bits") and run.prefers_bits(x.device)


def fake_bits(perm, n_targets, n_cols):
    return perm.new_empty(perm.shape[0], n_targets, -(-n_cols // 8), dtype=torch.uint8)


def new_bits(dropout, x, factor, perm, n_targets, backend):
    """Keep bits uint8 [P, targets, ceil(D / 8)] to be filled, or one dimension of nothing where masks are replayed."""
    if keeps_bits(dropout, x, factor, backend):
        return fake_bits(perm, n_targets, x.shape[1])
    return perm.new_empty(0, dtype=torch.uint8)


def kept(bits):
    """Keep bits, or None where there are none."""
    return bits if bits.dim() == 3 else None


def _check_dtypes(op, banks):
    for g, bank in enumerate(banks):
        if bank.dtype != banks[0].dtype:
            raise TypeError(f"{op}: bank[{g}] is {bank.dtype}, bank[0] is {banks[0].dtype}; use one dtype")


def main_grads(banks, *kinds):
    """Of the params of each kind ("A", "B", "bias") of all banks; [] when gradients are returned."""
    if not any(bank.main_grad for bank in banks):
        return []
    if not all(bank.main_grad for bank in banks):
        raise ValueError("main_grad is set on some banks of the group only; set it on all of them")
    return [t for kind in kinds for bank in banks for t in bank.main_grads(kind) or [bank.scale.new_empty(0)] * len(bank)]


def grad_dtype(fp32_grads, params):
    return torch.float32 if fp32_grads else params[0].dtype


def returned(main_grad, grads, need):
    """Gradients to return, None where none is wanted; with main_grad they are added to that instead."""
    wanted = [(main, g) for main, g, w in zip(main_grad, grads, need) if w and main.numel()]
    if wanted:
        torch._foreach_add_(*map(list, zip(*wanted)))
    return [g if w and not main_grad else None for g, w in zip(grads, need)]


def plan_args(plan):
    return plan.ids, plan.offsets, plan.perm, plan.tiles, plan.step


def factors(params, views, ranks, layouts):
    """One view per target and adapter of the params (or of their gradients)."""
    n, begin, found = len(ranks) // len(layouts), 0, []
    for g, layout in enumerate(map(LAYOUTS.__getitem__, layouts)):
        count = n if layout == "separate" else 1
        found += views(params[begin : begin + count], layout, ranks[g * n : (g + 1) * n])
        begin += count
    return found


def factors_A(params, ranks, layouts):
    return factors(params, views_A, ranks, layouts)


def factors_B(params, ranks, layouts):
    return factors(params, views_B, ranks, layouts)


def new_grads(params, views, need, ranks, layouts, dtype):
    """(gradients of the params, their views per adapter) in `dtype`; an unwanted one is an empty tensor."""
    n, begin, grads, found = len(ranks) // len(layouts), 0, [], []
    for g, layout in enumerate(map(LAYOUTS.__getitem__, layouts)):
        count = n if layout == "separate" else 1
        for p, wanted in zip(params[begin : begin + count], need[begin : begin + count]):
            made = torch.zeros_like if layout == "stacked" else torch.empty_like
            grads.append(made(p, dtype=dtype, memory_format=torch.contiguous_format) if wanted else p.new_empty(0, dtype=dtype))
        if layout == "separate":
            found += grads[begin:]
        else:
            found += views(grads[begin:], layout, ranks[g * n : (g + 1) * n]) if need[begin] else [grads[begin]] * n
        begin += count
    return grads, found


def fake_grads(params, need, fp32_grads):
    dtype = grad_dtype(fp32_grads, params)
    return [p.new_empty(p.shape if wanted else 0, dtype=dtype) for p, wanted in zip(params, need)]


def new_bias_grads(bias, need, dtype):
    return [torch.empty_like(b, dtype=dtype) if wanted else b.new_empty(0, dtype=dtype) for b, wanted in zip(bias, need)]


def s_width(ranks, n_targets):
    n = len(ranks) // n_targets
    return sum(max(ranks[g * n : (g + 1) * n]) for g in range(n_targets))


def s_dtype(x, A):
    return torch.promote_types(x.dtype, A[0].dtype)


def launchers(stem, x, factor, backend):
    return _backends.launchers(stem, x if s_dtype(x, [factor]) == x.dtype else factor, backend)


def new_e(dy, scale, perm, need):
    """e [targets, positions] for lora_expand_bwd, if a gate or scale wants its gradient."""
    return perm.new_empty(len(scale), len(perm), dtype=scale[0].dtype) if need else None


def gate_and_scale_grads(e, scale, gates, ids, offsets, perm, tiles, need_gates, need_scale, backend):
    """dgates [P] and one dscale [n] per target from e; empty where not needed."""
    empty = scale[0].new_empty(0)
    if e is None:
        return empty, [empty] * len(scale)
    dscale = [empty] * len(scale)
    if need_scale:
        run = _backends.launchers("task_reduce", e, backend)
        dscale = [run.task_reduce_fwd(e_g, gates, offsets, perm, tiles).to(e.dtype) for e_g in e]
    if not need_gates:
        return empty, dscale
    place = ids.clamp(min=0).long()  # e is zero where no adapter is
    return sum(s_g[place] * e_g for s_g, e_g in zip(scale, e)), dscale


def rows_of(op, x, bank, plan):
    """x as [T, D] rows with unit stride, after checking x, bank and plan against one another."""
    rows = bank_rows(op, x, bank)
    check_plan(op, plan, len(bank), rows.shape[0], x.device, "adapters in the bank", slots=True)
    return rows


def bank_rows(op, x, bank):
    """x as rows [..., D] with unit stride, after checking x and bank against one another."""
    check_bank(op, bank)
    if type(x).__name__ == "DTensor":
        raise TypeError(f"{op}: x is a DTensor; pass local tensors (x.to_local()) or shard by decoder layer")
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{op}: x is {got}; give float32, bfloat16, float16 or float64 activations")
    if x.dim() < 1 or x.shape[-1] != bank.in_features:
        raise ValueError(f"{op}: x is {tuple(x.shape)}, the bank takes {bank.in_features} features; x is [..., {bank.in_features}]")
    if bank.device != x.device:
        raise ValueError(f"{op}: x is on {x.device}, the bank on {bank.device}; move them to one device")
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def check_bank(op, bank):
    if not isinstance(bank, LoraBank):
        raise TypeError(f"{op}: bank is a {type(bank).__name__}; build one with LoraBank.from_factors(A, B, scale)")


def check_like(op, name, t, x):
    if t is None:
        return
    if type(t).__name__ == "DTensor":
        raise TypeError(f"{op}: {name} is a DTensor; shard by decoder layer so that it is a plain tensor in forward")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, x on {x.device}; move them to one device")
    if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{op}: {name} is {t.dtype}, x is {x.dtype}; use one dtype or torch.autocast")


def flat_gates(op, gates, plan, like):
    """gates as [P] in the dtype of the scale, or None."""
    if gates is None:
        return None
    if not isinstance(gates, torch.Tensor) or gates.shape != plan.shape:
        got = tuple(gates.shape) if isinstance(gates, torch.Tensor) else type(gates).__name__
        raise ValueError(f"{op}: gates is {got}; give one per id of the plan, {tuple(plan.shape)}")
    if gates.device != like.device:
        raise ValueError(f"{op}: gates is on {gates.device}, the bank on {like.device}; move them to one device")
    return gates.reshape(-1).to(like.dtype).contiguous()
