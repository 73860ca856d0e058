"""lora_expand: out of rank space, beside a base output.

Formula    y[row] = out[row] + sum over the row's positions p of c_p s_i (s[p] B_i^T + beta_i), i the adapter of p, c_p its gate
Shapes     s [T, R] or [T, K, R] as the plan's ids, out [..., O] or None -> y [..., O]
Gradients  s, out, every B_i and beta_i, the scale and the gates
Backends   reference, cpu, triton. No CUDA C++: the GEMMs want wgmma and TMA, which come through Triton
Cost       reads out once and writes y once (K times for K positions a row on a GPU); saved: s

    y = lora_expand(s, bank, plan, out=base, gates=weights)
"""

import torch

from .. import _backends
from .._op import below_autograd, load, pack, register, save, unpack
from ..bank import LAYOUTS, views_B
from ..plan import check_plan
from . import _lora

_ARGS = f"Tensor[] B, Tensor[] lora_bias, Tensor scale, Tensor? gates, int[] ranks, int[] layouts, {_lora.PLAN}"


def _kernel(s, out, n_rows, B, bias, scale, gates, ranks, layouts, ids, offsets, perm, tiles, step, main_grad, backend):
    run, views = _lora.launchers("lora_expand", s, B[0], backend), _lora.factors_B(B, ranks, layouts)
    y = s.new_zeros(n_rows, views[0].shape[0]) if out is None else out.clone(memory_format=torch.contiguous_format)
    run.lora_expand_fwd(s, views, bias, [scale], gates, offsets, perm, tiles, [y])
    return y


def _bwd_kernel(dy, s, B, bias, scale, gates, ranks, layouts, ids, offsets, perm, tiles, step, need, need_gates, need_scale, fp32_grads, backend):
    run, groups = _lora.launchers("lora_expand", s, B[0], backend), (offsets, perm, tiles)
    dtype = _lora.grad_dtype(fp32_grads, B)
    grads, dB = _lora.new_grads(B, views_B, need[: len(B)], ranks, layouts, dtype)
    dbias = _lora.new_bias_grads(bias, need[len(B) :], dtype)
    ds, e = torch.empty_like(s), _lora.new_e(dy, [scale], perm, need_gates or need_scale)
    run.lora_expand_bwd([dy], s, _lora.factors_B(B, ranks, layouts), bias, [scale], gates, *groups, ds, e, dB, dbias)
    dgates, (dscale,) = _lora.gate_and_scale_grads(e, [scale], gates, ids, *groups, need_gates, need_scale, backend)
    return ds, dgates, dscale, [*grads, *dbias]


def _fake(s, out, n_rows, B, bias, scale, gates, ranks, layouts, *_):
    return (s if out is None else out).new_empty(n_rows, _lora.factors_B(B, ranks, layouts)[0].shape[0])


def _bwd_fake(dy, s, B, bias, scale, gates, ranks, layouts, ids, offsets, perm, tiles, step, need, need_gates, need_scale, fp32_grads, backend):
    grads = _lora.fake_grads((*B, *bias), need, fp32_grads)
    return torch.empty_like(s), scale.new_empty(perm.shape if need_gates else 0), scale.new_empty(scale.shape if need_scale else 0), grads


class _LoraExpand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, *flat):
        args = unpack(spec, flat)
        with below_autograd():
            y = _op(*args)
        *rest, ctx.main_grad, ctx.backend = args[3:]
        ctx.spec = spec
        save(ctx, args[0], *rest)
        return y

    @staticmethod
    def backward(ctx, dy):
        need_s, need_out, _, need_B, need_bias, need_scale, need_gates, *_ = unpack(ctx.spec, ctx.needs_input_grad[1:])
        need = [*need_B, *(need_bias or [])]
        ds, dgates, dscale, grads = _bwd_op(dy.contiguous(), *load(ctx), need, need_gates, need_scale, bool(ctx.main_grad), ctx.backend)
        grads = _lora.returned(ctx.main_grad, grads, need)
        small = dscale if need_scale else None, dgates if need_gates else None
        lead = [None, ds if need_s else None, dy if need_out else None, None, *grads[: len(need_B)]]
        bias = grads[len(need_B) :] if need_bias else [None]
        found = [*lead, *bias, *small]
        return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def _apply(*args):
    flat, spec = pack(args)
    return _LoraExpand.apply(spec, *flat)


_op = register(
    "lora_expand",
    f"lora_expand(Tensor s, Tensor? out, SymInt n_rows, {_ARGS}, {_lora.MAIN_GRAD}, str backend) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    autograd=_apply,
    autocast=("s", "out", "B", "lora_bias"),
)
_bwd_op = register(
    "lora_expand",
    f"lora_expand_bwd(Tensor dy, Tensor s, {_ARGS}, bool[] need, bool need_gates, bool need_scale, bool fp32_grads, str backend) -> (Tensor ds, Tensor dgates, Tensor dscale, Tensor[] grads)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)


def lora_expand(s, bank, plan, out=None, *, gates=None, backend=None):
    """out + the LoRA part whose rank-space rows are s. Returns [..., O] like out, or [T, O] in the dtype of s.

    s: [T, R] or [T, K, R] for a plan of ids [T] or [T, K], R the largest rank of bank, whose B, bias and scale are read.
    out: [..., O] with T rows in all, never written. gates: float of the plan's shape, None = 1.
    Raises TypeError/ValueError naming what does not fit.
    """
    _lora.check_bank("lora_expand", bank)
    width = max(bank.ranks)
    if not isinstance(s, torch.Tensor) or s.shape != (*plan.shape, width):
        got = tuple(s.shape) if isinstance(s, torch.Tensor) else type(s).__name__
        raise ValueError(f"lora_expand: s is {got}; the plan and the bank take {(*plan.shape, width)}")
    check_plan("lora_expand", plan, len(bank), plan.n_rows, s.device, "adapters in the bank", slots=True)
    if bank.device != s.device:
        raise ValueError(f"lora_expand: s is on {s.device}, the bank on {bank.device}; move them to one device")
    shape = (plan.n_rows, bank.out_features)
    if out is not None:
        if out.shape[-1:] != shape[1:] or out.numel() != shape[0] * shape[1]:
            raise ValueError(f"lora_expand: out is {tuple(out.shape)}; the plan and the bank give {shape}")
        shape, out = out.shape, out.reshape(shape)
    gates = _lora.flat_gates("lora_expand", gates, plan, bank.scale)
    factors = bank.params_B, bank.bias, bank.scale, gates, bank.ranks, [LAYOUTS.index(bank.layout)]
    flat = s.flatten(0, -2)
    y = _op(flat, out, plan.n_rows, *factors, *_lora.plan_args(plan), _lora.main_grads([bank], "B", "bias"), _backends.requested(backend))
    return y.view(shape)
