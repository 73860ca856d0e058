"""dora_norm, dora_scale, dora_dropout, dora_rescale, dora_linear: weight-decomposed LoRA (DoRA) for batches of many adapters.

Formula    y[t] = m_i / norm_i o (x W^T + s_i (B_i A_i x + beta_i)) + bias, i the adapter of row t;  norm_i = ||W + s_i B_i A_i|| by row
           With dropout, as in PEFT, both products read the dropped x:  y = (x - x_d) W^T + bias + m_i / norm_i o (x_d W^T + ...)
Shapes     x [..., D] with T rows, weight [O, D], bias [O], bank D -> O with n adapters, magnitudes m_i [O]; norm and scale [n, O]
Gradients  x, weight, bias, the bank's scale, every A_i, B_i, beta_i, m_i; the norm is a constant (DoRA section 4.3, arXiv 2402.09353)
Backends   reference, cpu, triton. No CUDA C++: the norm is a GEMM that wants tensor cores through Triton, the rest is bound by memory
Cost       the norm reads W once from memory and from cache for each further adapter; W + s B A never exists. Saved: x, s, z [T, O]

    y = dora_linear(x, weight, bias, bank, magnitudes, plan)
    y = dora_rescale(lora_delta(x, bank, plan, out=quantised(x)), dora_scale(dequantised, bank, magnitudes), plan, bias)
"""

import torch
import torch.nn.functional as F

from .. import _backends
from .._op import below_autograd, load, register, save
from ..bank import LAYOUTS
from ..plan import check_plan
from . import _lora
from .lora import lora_delta, lora_linear


def _norm_kernel(weight, A, B, scale, ranks, layouts, backend):
    run = _lora.launchers("dora", weight, A[0], backend)
    return run.dora_norm(weight, _lora.factors_A(A, ranks, layouts), _lora.factors_B(B, ranks, layouts), scale)


def _norm_fake(weight, A, B, scale, ranks, layouts, backend):
    return scale.new_empty(len(ranks), weight.shape[0], dtype=torch.promote_types(torch.float32, _lora.s_dtype(weight, A)))


def _dropout_kernel(x, threshold, seeds, offsets, perm, tiles, step, site, backend):
    return _backends.launchers("dora", x, backend).dora_dropout(x, threshold, seeds, offsets, perm, tiles, step, site)


def _dropout_fake(x, *_):
    return x.new_empty(x.shape)


class _DoraDropout(torch.autograd.Function):
    """The mask is its own adjoint."""

    @staticmethod
    def forward(ctx, x, *args):
        with below_autograd():
            y = _dropout_op(x, *args)
        save(ctx, *args)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _dropout_bwd_op(dy.contiguous(), *load(ctx)), *(None,) * (len(ctx.needs_input_grad) - 1)


def _rescale_kernel(z, base, scale, ids, offsets, perm, tiles, backend):
    return _backends.launchers("dora", z, backend).dora_fwd(z, base, scale, ids)


def _rescale_fake(z, *_):
    return z.new_empty(z.shape)


def _rescale_bwd_kernel(dy, z, scale, ids, offsets, perm, tiles, backend):
    return _backends.launchers("dora", dy, backend).dora_bwd(dy, z, scale, ids, offsets, perm, tiles)


def _rescale_bwd_fake(dy, z, scale, *_):
    return dy.new_empty(dy.shape), scale.new_empty(0 if z is None else scale.shape)


class _DoraRescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, base, scale, *args):
        with below_autograd():
            y = _rescale_op(z, base, scale, *args)
        save(ctx, z if ctx.needs_input_grad[2] else None, scale, *args)
        return y

    @staticmethod
    def backward(ctx, dy):
        need_z, need_base, need_scale, *rest = ctx.needs_input_grad
        dz, dscale = _rescale_bwd_op(dy.contiguous(), *load(ctx)) if need_z or need_scale else (None, None)
        found = dz if need_z else None, dy if need_base else None, dscale if need_scale else None
        return *found, *(None,) * len(rest)


_FACTORS = "Tensor[] A, Tensor[] B, Tensor scale, int[] ranks, int[] layouts"
_GROUPS = "Tensor offsets, Tensor perm, Tensor tiles"
_DROPOUT = f"Tensor threshold, Tensor seeds, {_GROUPS}, Tensor step, int site, str backend"
_norm_op = register("dora", f"dora_norm(Tensor weight, {_FACTORS}, str backend) -> Tensor", kernel=_norm_kernel, fake=_norm_fake)
_dropout_op = register(
    "dora",
    f"dora_dropout(Tensor x, {_DROPOUT}) -> Tensor",
    kernel=_dropout_kernel,
    fake=_dropout_fake,
    autograd=lambda *args: _DoraDropout.apply(*args),
)
_dropout_bwd_op = register("dora", f"dora_dropout_bwd(Tensor dy, {_DROPOUT}) -> Tensor", kernel=_dropout_kernel, fake=_dropout_fake)
_rescale_op = register(
    "dora",
    f"dora_rescale(Tensor z, Tensor? base, Tensor scale, Tensor ids, {_GROUPS}, str backend) -> Tensor",
    kernel=_rescale_kernel,
    fake=_rescale_fake,
    autograd=lambda *args: _DoraRescale.apply(*args),
)
_rescale_bwd_op = register(
    "dora",
    f"dora_rescale_bwd(Tensor dy, Tensor? z, Tensor scale, Tensor ids, {_GROUPS}, str backend) -> (Tensor dz, Tensor dscale)",
    kernel=_rescale_bwd_kernel,
    fake=_rescale_bwd_fake,
)


def dora_norm(weight, bank, *, backend=None):
    """[n, O] norms of the rows of W + s_i B_i A_i, one row of the result per adapter; a constant to autograd.

    weight: [O, D], any strides (an embedding table or a Conv1D weight [D, O] goes in as weight.T). bank: LoraBank over
    D -> O; its bias is not part of the weight. float32, or float64 from float64 inputs; sums of squares of the adapted
    weight itself, so a W that s B A cancels loses no digits. New magnitudes start as these norms.
    Reads the factors as they are at the call: after an optimizer step, call again.
    Raises TypeError/ValueError naming what does not fit.
    """
    _lora.check_bank("dora_norm", bank)
    _check_weight("dora_norm", weight, bank)
    A, B = ([p.detach() for p in params] for params in (bank.params_A, bank.params_B))
    layouts = [LAYOUTS.index(bank.layout)]
    return _norm_op(weight.detach(), A, B, bank.scale.detach(), bank.ranks, layouts, _backends.requested(backend))


def dora_scale(weight, bank, magnitudes, *, norm=None, eps=0.0, backend=None):
    """[n, O] row scales m_i / norm_i, differentiable in the magnitudes alone, as PEFT detaches the norm.

    magnitudes: one [O] per adapter, or [n, O]; None in the list marks an adapter without DoRA, whose scale is 1.
    norm: what dora_norm(weight, bank) gave for these very factors, to share it between micro-batches; None computes it.
    eps: lower bound of the norm. 0 divides by a zero norm, as PEFT does. Others as in dora_norm.
    """
    norm = dora_norm(weight, bank, backend=backend) if norm is None else norm.detach()
    n, width = len(bank), bank.out_features
    if norm.shape != (n, width):
        raise ValueError(f"dora_scale: norm is {tuple(norm.shape)}; dora_norm(weight, bank) gives {(n, width)}")
    given = [*magnitudes]
    if len(given) != n or any(m is not None and m.shape != (width,) for m in given):
        got = [None if m is None else tuple(m.shape) for m in given]
        raise ValueError(f"dora_scale: magnitudes are {got}; give one [{width}] or None for each of the {n} adapters")
    norm = norm.clamp(min=eps) if eps else norm
    if isinstance(magnitudes, torch.Tensor):
        return magnitudes.to(norm.dtype) / norm
    one = norm.new_ones(width)
    if any(m is None for m in given):
        norm = torch.stack([one if m is None else row for m, row in zip(given, norm)])
    return torch.stack([one if m is None else m.to(norm.dtype) for m in given]) / norm


def dora_dropout(x, bank, plan, *, training=True, site=0, backend=None):
    """x [..., D] with the dropout of each row's adapter, the mask that lora_linear draws for this plan and site.

    plan: GroupPlan of ids [T]; rows of no adapter keep x. Nothing is saved but the plan. Others as in lora_linear.
    """
    rows = _lora.rows_of("dora_dropout", x, bank, plan)
    check_plan("dora_dropout", plan, len(bank), len(rows), x.device, "adapters in the bank")
    if not training:
        return x
    groups = plan.offsets, plan.perm, plan.tiles, plan.step
    return _dropout_op(rows, bank.threshold, bank.seeds, *groups, site, _backends.requested(backend)).view(x.shape)


def dora_rescale(z, scale, plan, base=None, *, backend=None):
    """y[t] = scale[i] o z[t] + base[t] for row t of adapter i; z[t] + base[t] for rows of no adapter.

    z: [..., O] with T rows. scale: [n, O] from dora_scale. plan: GroupPlan of ids [T] over n adapters. base: what
    broadcasts to z's shape (a bias [O], or rows), or None. Multiplies and adds in the dtype of scale; y has z's dtype.
    Raises TypeError/ValueError naming what does not fit.
    """
    op, width = "dora_rescale", z.shape[-1]
    wide = torch.promote_types(z.dtype, torch.float32)
    if scale.dim() != 2 or scale.shape[1] != width or scale.dtype != wide or scale.device != z.device:
        raise ValueError(f"{op}: scale is {scale.dtype} {tuple(scale.shape)} on {scale.device}; z takes {wide} [adapters, {width}] on {z.device}")
    rows = z.reshape(-1, width)
    check_plan(op, plan, len(scale), len(rows), z.device, "rows of scale")
    if base is not None:
        _lora.check_like(op, "base", base, z)
        base = base.to(z.dtype).expand(z.shape).reshape(rows.shape) if base.dim() > 1 else base.to(z.dtype).expand(rows.shape)
        base = base if base.stride(-1) == 1 else base.contiguous()
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = _rescale_op(rows, base, scale.contiguous(), plan.ids, plan.offsets, plan.perm, plan.tiles, _backends.requested(backend))
    return y.view(z.shape)


def dora_linear(x, weight, bias, bank, magnitudes, plan, *, training=True, site=0, norm=None, eps=0.0, batch_invariant=False, backend=None):
    """y [..., O] of a linear layer whose rows each have a DoRA adapter of their own, or a plain one, or none.

    magnitudes, norm, eps: as in dora_scale. plan: GroupPlan of ids [T]; -1 = x W^T + bias.
    training: apply the bank's dropout with a second base matmul, as PEFT does; a bank built without dropout
    (bank.has_dropout) takes one either way. batch_invariant: as in lora_linear, for layers without dropout.
    Others as in lora_linear. Raises TypeError/ValueError naming what does not fit.
    """
    _lora.check_bank("dora_linear", bank)
    _check_weight("dora_linear", weight, bank)
    check_plan("dora_linear", plan, len(bank), plan.n_rows, x.device, "adapters in the bank")
    scale = dora_scale(weight, bank, magnitudes, norm=norm, eps=eps, backend=backend)
    if not (training and bank.has_dropout):
        z = lora_linear(x, weight, None, bank, plan, training=False, batch_invariant=batch_invariant, backend=backend)
        return dora_rescale(z, scale, plan, bias, backend=backend)
    if batch_invariant:
        raise ValueError("dora_linear: batch_invariant takes layers without dropout; pass training=False or dropout 0")
    dropped = dora_dropout(x, bank, plan, site=site, backend=backend)
    z = lora_delta(x, bank, plan, out=F.linear(dropped, weight), site=site, backend=backend)
    return dora_rescale(z, scale, plan, F.linear(x - dropped, weight, bias), backend=backend)


def _check_weight(op, weight, bank):
    if type(weight).__name__ == "DTensor":
        raise TypeError(f"{op}: weight is a DTensor; shard by decoder layer so that it is a plain tensor in forward")
    if not weight.is_floating_point():
        raise TypeError(f"{op}: weight is {weight.dtype}; dequantise it, and see the page of mtkernels.ops.dora for a quantised base")
    if weight.shape != (bank.out_features, bank.in_features):
        raise ValueError(f"{op}: weight is {tuple(weight.shape)}, the bank maps {bank.in_features} -> {bank.out_features}; weight is [O, D]")
    if weight.device != bank.device:
        raise ValueError(f"{op}: weight is on {weight.device}, the bank on {bank.device}; move them to one device")
