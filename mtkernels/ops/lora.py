"""lora_linear, lora_delta: batched heterogeneous LoRA.

Formula    row t of adapter i:  y = x W^T + b + s_i ((M o x) A_i^T B_i^T + beta_i);  rows without adapter: y = x W^T + b
           M keeps an element with probability 1 - p_i and divides it by that, replayed from Philox (reference/philox.py)
Shapes     x [..., D] with T rows, weight [O, D], bias [O], A_i [R_i, D], B_i [O, R_i], beta_i [O]; any R_i >= 0
Gradients  x, weight, bias and every A_i, B_i, beta_i (zeros for adapters without rows)
Backends   reference, cpu, triton. No CUDA C++: the GEMMs want wgmma and TMA, which come through Triton
Cost       saved: x, S [T, max R]; never a mask, a dropped copy of x, or W + BA

    y = lora_linear(x, weight, bias, bank, plan)
"""

import torch
import torch.nn.functional as F

from .. import _backends, _native
from .._op import below_autograd, register
from ..bank import LoraBank
from ..plan import check_plan

_GROUPS = "Tensor[] A, Tensor[] B, Tensor[] lora_bias, Tensor scale, Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step"
_OPTIONS = "int site, bool dropout, str backend"


def _launchers(x, A, backend):
    dtype = torch.promote_types(x.dtype, A[0].dtype)
    return _backends.launchers("lora", x if dtype == x.dtype else A[0], backend)


def _base(x, weight, bias, native):
    if native and x.dtype in (torch.bfloat16, torch.float16) and not _native.fast_16bit(x.dtype):
        return _native.ops().lora_base_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _base_dx(dy, weight, native):
    if native and dy.dtype in (torch.bfloat16, torch.float16) and not _native.fast_16bit(dy.dtype):
        return _native.ops().lora_base_dx(dy, weight)
    return dy @ weight


def _is_native(run):
    return _native.available() and run is _native.ops()


def _linear_kernel(x, weight, bias, A, B, lora_bias, *rest):
    *groups, site, dropout, backend = rest
    run = _launchers(x, A, backend)
    y = _base(x, weight, bias, _is_native(run))
    return y, run.lora_fwd(x, A, B, lora_bias, *groups, site, dropout, y)


def _delta_kernel(x, out, A, B, lora_bias, *rest):
    *groups, site, dropout, backend = rest
    y = x.new_zeros(len(x), B[0].shape[0]) if out is None else out.clone(memory_format=torch.contiguous_format)
    return y, _launchers(x, A, backend).lora_fwd(x, A, B, lora_bias, *groups, site, dropout, y)


def _bwd_kernel(dy, x, weight, s, A, B, lora_bias, *rest):
    *groups, site, dropout, need_dx, need_factors, backend = rest
    run = _launchers(dy, A, backend)
    dx = None
    if need_dx:
        dx = dy.new_zeros(len(dy), A[0].shape[1]) if weight is None else _base_dx(dy, weight, _is_native(run))
    grads = run.lora_bwd(dy, x, s, A, B, lora_bias, *groups, site, dropout, dx, need_factors)
    return dy.new_empty(0) if dx is None else dx, grads


def _s_fake(x, A):
    return x.new_empty(x.shape[0], max(a.shape[0] for a in A), dtype=torch.promote_types(x.dtype, A[0].dtype))


def _linear_fake(x, weight, bias, A, *_):
    return x.new_empty(x.shape[0], weight.shape[0]), _s_fake(x, A)


def _delta_fake(x, out, A, B, *_):
    return x.new_empty(x.shape[0], B[0].shape[0]), _s_fake(x, A)


def _bwd_fake(dy, x, weight, s, A, B, lora_bias, *rest):
    need_dx, need_factors = rest[-3:-1]
    dx = dy.new_empty(dy.shape[0], A[0].shape[1]) if need_dx else dy.new_empty(0)
    return dx, [torch.empty_like(t) for t in (*A, *B, *lora_bias)] if need_factors else []


_LISTS = ("x", "A", "B", "lora_bias")
_linear_op = register(
    "lora",
    f"lora_linear(Tensor x, Tensor weight, Tensor? bias, {_GROUPS}, {_OPTIONS}) -> (Tensor y, Tensor s)",
    kernel=_linear_kernel,
    fake=_linear_fake,
    autograd=lambda *args: _apply(_LoraLinear, args),
    autocast=(*_LISTS, "weight", "bias"),
)
_delta_op = register(
    "lora",
    f"lora_delta(Tensor x, Tensor? out, {_GROUPS}, {_OPTIONS}) -> (Tensor y, Tensor s)",
    kernel=_delta_kernel,
    fake=_delta_fake,
    autograd=lambda *args: _apply(_LoraDelta, args),
    autocast=(*_LISTS, "out"),
)
_bwd_op = register(
    "lora",
    f"lora_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor s, {_GROUPS}, int site, bool dropout, bool need_dx, bool need_factors, str backend) -> (Tensor dx, Tensor[] grads)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)


def _apply(function, args):
    """autograd.Function wants tensors, not lists: pass the factors flat, their counts in front."""
    first, second, *head = args[: function.n_base]
    A, B, lora_bias, *rest = args[function.n_base :]
    return function.apply((len(A), len(lora_bias)), rest, first, second, *head, *A, *B, *lora_bias)


def _split(counts, factors):
    n, n_bias = counts
    return list(factors[:n]), list(factors[n : 2 * n]), list(factors[2 * n : 2 * n + n_bias])


class _Lora(torch.autograd.Function):
    """The LoRA part shared by both ops: what is saved and how the backward op is called."""

    @staticmethod
    def save(ctx, counts, rest, x, s, factors, weight, keep_x):
        *groups, ctx.site, ctx.dropout, ctx.backend = rest
        ctx.counts, ctx.has_weight, ctx.has_x = counts, weight is not None, keep_x
        ctx.save_for_backward(s, *groups, *factors, *([weight] if ctx.has_weight else []), *([x] if keep_x else []))
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)

    @staticmethod
    def grads(ctx, dy, need_dx, need_factors):
        s, *saved = ctx.saved_tensors
        x = saved.pop() if ctx.has_x else None
        weight = saved.pop() if ctx.has_weight else None
        groups, factors = saved[:7], saved[7:]
        dy = dy.contiguous()
        if x is None:  # only the factors' gradients read it
            x = dy.new_empty(1, factors[0].shape[1]).expand(dy.shape[0], -1)
        dx, grads = _bwd_op(dy, x, weight, s, *_split(ctx.counts, factors), *groups, ctx.site, ctx.dropout, need_dx, need_factors, ctx.backend)
        return dy, x, dx if need_dx else None, grads if need_factors else [None] * len(factors)


class _LoraLinear(_Lora):
    n_base = 3

    @staticmethod
    def forward(ctx, counts, rest, x, weight, bias, *factors):
        with below_autograd():
            y, s = _linear_op(x, weight, bias, *_split(counts, factors), *rest)
        _Lora.save(ctx, counts, rest, x, s, factors, weight, any(ctx.needs_input_grad[i] for i in (3, *range(5, 5 + len(factors)))))
        return y, s

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        _, _, need_x, need_w, need_b, *need_factors = ctx.needs_input_grad
        dy, x, dx, grads = _Lora.grads(ctx, dy, need_x, any(need_factors))
        return None, None, dx, dy.T @ x if need_w else None, dy.sum(0) if need_b else None, *grads


class _LoraDelta(_Lora):
    n_base = 2

    @staticmethod
    def forward(ctx, counts, rest, x, out, *factors):
        with below_autograd():
            y, s = _delta_op(x, out, *_split(counts, factors), *rest)
        _Lora.save(ctx, counts, rest, x, s, factors, None, any(ctx.needs_input_grad[4:]))
        return y, s

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        _, _, need_x, need_out, *need_factors = ctx.needs_input_grad
        dy, _, dx, grads = _Lora.grads(ctx, dy, need_x, any(need_factors))
        return None, None, dx, dy if need_out else None, *grads


def lora_linear(x, weight, bias, bank, plan, *, training=True, site=0, gates=None, batch_invariant=False, backend=None):
    """y [..., O] = x W^T + bias, plus each row's own adapter.

    x: [..., D] with T rows in all, float32/bfloat16/float16 (float64 on the reference). weight [O, D], bias [O] or None:
        dtype of x. bank: LoraBank over D -> O; its dtype may differ from x (fp32 adapters over bf16 activations: the
        LoRA part is computed in the wider type). plan: GroupPlan of T ids over len(bank) adapters, -1 = base only.
    training: apply the bank's dropout. site: distinguishes the layers that share a plan, so that their masks differ.
    Raises TypeError/ValueError naming what does not fit.
    """
    _check_later(gates=gates, batch_invariant=batch_invariant)
    rows = _rows("lora_linear", x, bank, plan)
    if weight.shape != (bank.out_features, bank.in_features):
        raise ValueError(f"lora_linear: weight is {tuple(weight.shape)}, the bank maps {bank.in_features} -> {bank.out_features}; weight is [O, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"lora_linear: bias is {tuple(bias.shape)}; give {tuple(weight.shape[:1])} or None")
    for name, t in (("weight", weight), ("bias", bias)):
        _check_like("lora_linear", name, t, x)
    y, _ = _linear_op(rows, weight, bias, *_bank_args(bank, plan), site, training, _backends.requested(backend))
    return y.view(*x.shape[:-1], bank.out_features)


def lora_delta(x, bank, plan, out=None, *, training=True, site=0, gates=None, backend=None):
    """The LoRA part alone, or out + it: for a base that is quantised, sharded or computed elsewhere.

    x: [..., D] with T rows; out: [..., O] or None, never written; the rest as in lora_linear. Returns [..., O].
    """
    _check_later(gates=gates)
    rows = _rows("lora_delta", x, bank, plan)
    shape = (*x.shape[:-1], bank.out_features)
    if out is not None:
        if out.shape != shape:
            raise ValueError(f"lora_delta: out is {tuple(out.shape)}; x and the bank give {shape}")
        _check_like("lora_delta", "out", out, x)
        out = out.reshape(-1, bank.out_features)
    y, _ = _delta_op(rows, out, *_bank_args(bank, plan), site, training, _backends.requested(backend))
    return y.view(shape)


def _bank_args(bank, plan):
    return bank.A, bank.B, bank.bias, bank.scale, bank.threshold, bank.seeds, plan.offsets, plan.perm, plan.tiles, plan.step


def _rows(op, x, bank, plan):
    if not isinstance(bank, LoraBank):
        raise TypeError(f"{op}: bank is a {type(bank).__name__}; build one with LoraBank.from_factors(A, B, scale)")
    if type(x).__name__ == "DTensor":
        raise TypeError(f"{op}: x is a DTensor; pass local tensors (x.to_local()) or shard by decoder layer")
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{op}: x is {got}; give float32, bfloat16, float16 or float64 activations")
    if x.dim() < 1 or x.shape[-1] != bank.in_features:
        raise ValueError(f"{op}: x is {tuple(x.shape)}, the bank takes {bank.in_features} features; x is [..., {bank.in_features}]")
    if bank.A[0].device != x.device:
        raise ValueError(f"{op}: x is on {x.device}, the bank on {bank.A[0].device}; move them to one device")
    rows = x.reshape(-1, x.shape[-1])
    check_plan(op, plan, len(bank), rows.shape[0], x.device, "adapters in the bank")
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _check_like(op, name, t, x):
    if t is None:
        return
    if type(t).__name__ == "DTensor":
        raise TypeError(f"{op}: {name} is a DTensor; shard by decoder layer so that it is a plain tensor in forward")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, x on {x.device}; move them to one device")
    if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{op}: {name} is {t.dtype}, x is {x.dtype}; use one dtype or torch.autocast")


def _check_later(**options):
    for name, value in options.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}= is not supported yet; one ungated adapter per row, and torch's own GEMM for the base, are")
