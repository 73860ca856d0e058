"""lora_shrink: rows into the rank space of their own adapters.

Formula    s[p] = (M o x[row of p]) A_i^T for position p of adapter i, zeros right of its rank and where no adapter is
Shapes     x [..., D] with T rows, ids of the plan [T] or [T, K] -> s [T, R] or [T, K, R], R the largest rank
Gradients  x and every A_i (zeros for adapters without rows)
Backends   reference, cpu, triton. No CUDA C++: the GEMMs want wgmma and TMA, which come through Triton
Cost       reads x once; saved: x, and with dropout_mode="bitmask" one bit for each of its elements

    s = lora_shrink(x, bank, plan)
    y = lora_expand(torch.relu(s), bank, plan, out=base)        # any map between the two is plain torch on [T, R]
"""

import torch

from .. import _backends
from .._op import below_autograd, load, pack, register, save, unpack
from ..bank import LAYOUTS, views_A
from . import _lora

_ARGS = f"Tensor[] A, Tensor threshold, Tensor seeds, int[] ranks, int[] layouts, {_lora.PLAN}, int site, int dropout"


def _kernel(x, A, threshold, seeds, ranks, layouts, ids, offsets, perm, tiles, step, site, dropout, main_grad, backend):
    run, bits = _lora.launchers("lora_shrink", x, A[0], backend), _lora.new_bits(dropout, x, A[0], perm, 1, backend)
    mask = [threshold], [seeds], offsets, perm, tiles, step, [site], bool(dropout)
    return run.lora_shrink_fwd(x, _lora.factors_A(A, ranks, layouts), *mask, _lora.kept(bits)), bits


def _bwd_kernel(ds, x, bits, A, threshold, seeds, ranks, layouts, ids, offsets, perm, tiles, step, site, dropout, need_dx, need, fp32_grads, backend):
    run = _lora.launchers("lora_shrink", x, A[0], backend)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_dx else None
    grads, dA = _lora.new_grads(A, views_A, need, ranks, layouts, _lora.grad_dtype(fp32_grads, A))
    mask = [threshold], [seeds], offsets, perm, tiles, step, [site], bool(dropout)
    run.lora_shrink_bwd(ds, x, _lora.factors_A(A, ranks, layouts), *mask, dx, dA, bits)
    return x.new_empty(0) if dx is None else dx, grads


def _fake(x, A, threshold, seeds, ranks, layouts, ids, offsets, perm, tiles, step, site, dropout, main_grad, backend):
    bits = _lora.new_bits(dropout, x, A[0], perm, 1, backend)
    return x.new_empty(perm.shape[0], max(ranks), dtype=_lora.s_dtype(x, A)), bits


def _bwd_fake(ds, x, bits, A, threshold, seeds, ranks, layouts, *rest):
    need_dx, need, fp32_grads, _ = rest[-4:]
    return x.new_empty(x.shape if need_dx else 0), _lora.fake_grads(A, need, fp32_grads)


class _LoraShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, *flat):
        args = unpack(spec, flat)
        with below_autograd():
            s, bits = _op(*args)
        *rest, ctx.main_grad, ctx.backend = args[1:]
        ctx.spec = spec
        save(ctx, args[0], _lora.kept(bits), *rest)
        ctx.mark_non_differentiable(bits)
        return s, bits

    @staticmethod
    def backward(ctx, ds, _):
        need_x, need_A, *_ = unpack(ctx.spec, ctx.needs_input_grad[1:])
        dx, grads = _bwd_op(ds.contiguous(), *load(ctx), need_x, need_A, bool(ctx.main_grad), ctx.backend)
        dA = _lora.returned(ctx.main_grad, grads, need_A)
        return None, dx if need_x else None, *dA, *(None,) * (len(ctx.needs_input_grad) - 2 - len(dA))


def _apply(*args):
    flat, spec = pack(args)
    return _LoraShrink.apply(spec, *flat)


_op = register(
    "lora_shrink",
    f"lora_shrink(Tensor x, {_ARGS}, {_lora.MAIN_GRAD}, str backend) -> (Tensor s, Tensor bits)",
    kernel=_kernel,
    fake=_fake,
    autograd=_apply,
    autocast=("x", "A"),
)
_bwd_op = register(
    "lora_shrink",
    f"lora_shrink_bwd(Tensor ds, Tensor x, Tensor? bits, {_ARGS}, bool need_dx, bool[] need, bool fp32_grads, str backend) -> (Tensor dx, Tensor[] grads)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)


def lora_shrink(x, bank, plan, *, training=True, site=0, dropout_mode="auto", backend=None):
    """s [T, R], or [T, K, R] for a plan of ids [T, K]: each row in the rank space of its adapter.

    x: [..., D] with T rows, float32/bfloat16/float16 (float64 on the reference). bank: LoraBank from D (its B, scale
    and bias are not read); R is its largest rank. plan: GroupPlan over len(bank) adapters, -1 = zeros.
    training, site, dropout_mode: dropout of the bank, as in lora_linear. The result has the wider dtype of x and the factors.
    Raises TypeError/ValueError naming what does not fit.
    """
    rows = _lora.rows_of("lora_shrink", x, bank, plan)
    factors = bank.params_A, bank.threshold, bank.seeds, bank.ranks, [LAYOUTS.index(bank.layout)]
    dropout = _lora.dropout_arg("lora_shrink", [bank], training, dropout_mode)
    s, _ = _op(rows, *factors, *_lora.plan_args(plan), site, dropout, _lora.main_grads([bank], "A"), _backends.requested(backend))
    return s.view(*plan.shape, s.shape[1])
