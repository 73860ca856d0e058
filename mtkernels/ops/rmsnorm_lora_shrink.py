"""rmsnorm_lora_shrink: RMSNorm that hands its result to LoRA layers in rank space too, so that their shrinks read nothing again.

Formula    xn = x / sqrt(mean(x^2) + eps) * (offset + gamma) in the dtype of x, statistics in float32; per target g and
           position p of adapter i:  s_g[p] = (M_g o xn[row of p]) A_gi^T, zeros right of its rank and where no adapter is
Shapes     x [..., D] with T rows, gamma [D], ids of the plan [T] or [T, K] -> xn [..., D], s [T, R] or [T, K, R], R = sum
           over targets of the largest rank, target after target
Gradients  x, gamma (same bits in every run, but shared by all groups) and every A_gi (zeros for adapters without rows)
Backends   reference, cpu, triton. No CUDA C++: the GEMMs want wgmma and TMA, which come through Triton
Cost       reads x once and writes xn once, whatever the targets; backward reads x, dxn and writes dx. Saved: x, 1/rms [T], s,
           and with dropout_mode="bitmask" one bit for each element of x and target; never xn (nor does a frozen base layer)

    xn, s = rmsnorm_lora_shrink(h, gamma, eps, (q, k, v), plan)
    s_q, s_k, s_v = s.split([max(bank.ranks) for bank in (q, k, v)], -1)
    y_q = lora_expand(s_q, q, plan, out=F.linear(xn, W_q))
"""

import torch

from .. import _backends
from .._op import below_autograd, load, pack, register, save, unpack
from ..bank import views_A
from . import _lora

CASTING = ("llama", "gemma")


def _kernel(x, gamma, eps, offset, round_first, A, threshold, seeds, ranks, layouts, ids, offsets, perm, tiles, step, sites, dropout, main_grad, backend):
    run, views = _lora.launchers("rmsnorm_lora_shrink", x, A[0], backend), _lora.factors_A(A, ranks, layouts)
    bits = _lora.new_bits(dropout, x, A[0], perm, len(sites), backend)
    plan = offsets, perm, tiles, step, sites, bool(dropout)
    return *run.rmsnorm_lora_shrink_fwd(x, gamma, eps, offset, round_first, views, threshold, seeds, *plan, _lora.kept(bits)), bits


def _bwd_kernel(dxn, ds, x, gamma, rstd, s, bits, offset, round_first, A, threshold, seeds, ranks, layouts, ids, *rest):
    offsets, perm, tiles, step, sites, dropout, need_dx, need_dgamma, need, fp32_grads, backend = rest
    run, views = _lora.launchers("rmsnorm_lora_shrink", x, A[0], backend), _lora.factors_A(A, ranks, layouts)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else None
    dgamma = torch.empty_like(gamma) if need_dgamma else None
    grads, dA = _lora.new_grads(A, views_A, need, ranks, layouts, _lora.grad_dtype(fp32_grads, A))
    plan = offsets, perm, tiles, step, sites, bool(dropout)
    run.rmsnorm_lora_shrink_bwd(dxn, ds, x, gamma, rstd, s, offset, round_first, views, threshold, seeds, *plan, dx, dgamma, dA, bits)
    return x.new_empty(0) if dx is None else dx, gamma.new_empty(0) if dgamma is None else dgamma, grads


def _fake(x, gamma, eps, offset, round_first, A, threshold, seeds, ranks, layouts, ids, offsets, perm, *rest):
    _, _, sites, dropout, _, backend = rest
    s = x.new_empty(perm.shape[0], _lora.s_width(ranks, len(layouts)), dtype=_lora.s_dtype(x, A))
    rstd = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), s, rstd, _lora.new_bits(dropout, x, A[0], perm, len(sites), backend)


def _bwd_fake(dxn, ds, x, gamma, rstd, s, bits, offset, round_first, A, *rest):
    need_dx, need_dgamma, need, fp32_grads, _ = rest[-5:]
    grads = _lora.fake_grads(A, need, fp32_grads)
    return x.new_empty(x.shape if need_dx else 0), gamma.new_empty(gamma.shape if need_dgamma else 0), grads


class _RmsnormLoraShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, *flat):
        args = unpack(spec, flat)
        with below_autograd():
            xn, s, rstd, bits = _op(*args)
        x, gamma, _, *rest, ctx.main_grad, ctx.backend = args
        ctx.spec = spec
        save(ctx, x, gamma, rstd, s, _lora.kept(bits), *rest)
        ctx.mark_non_differentiable(rstd, bits)
        return xn, s, rstd, bits

    @staticmethod
    def backward(ctx, dxn, ds, *_):
        need_x, need_gamma, _, _, _, need_A, *_ = unpack(ctx.spec, ctx.needs_input_grad[1:])
        dx, dgamma, grads = _bwd_op(dxn.contiguous(), ds.contiguous(), *load(ctx), need_x, need_gamma, need_A, bool(ctx.main_grad), ctx.backend)
        dA = _lora.returned(ctx.main_grad, grads, need_A)
        found = [None, dx if need_x else None, dgamma if need_gamma else None, None, None, None, *dA]
        return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def _apply(*args):
    flat, spec = pack(args)
    return _RmsnormLoraShrink.apply(spec, *flat)


_op = register(
    "rmsnorm_lora_shrink",
    f"rmsnorm_lora_shrink(Tensor x, Tensor gamma, float eps, float offset, bool round_first, {_lora.SHRINK}, {_lora.MAIN_GRAD}, str backend)"
    " -> (Tensor xn, Tensor s, Tensor rstd, Tensor bits)",
    kernel=_kernel,
    fake=_fake,
    autograd=_apply,
    autocast=("A",),
)
_bwd_op = register(
    "rmsnorm_lora_shrink",
    f"rmsnorm_lora_shrink_bwd(Tensor dxn, Tensor ds, Tensor x, Tensor gamma, Tensor rstd, Tensor s, Tensor? bits, float offset, bool round_first,"
    f" {_lora.SHRINK}, bool need_dx, bool need_dgamma, bool[] need, bool fp32_grads, str backend) -> (Tensor dx, Tensor dgamma, Tensor[] grads)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)


def rmsnorm_lora_shrink(
    x, gamma, eps, banks, plan, *, training=True, sites=None, offset=0.0, casting=None, dropout_mode="auto", backend=None
):
    """(xn [..., D], s): x normalised, and its rank-space rows for every bank; s is [T, R] or [T, K, R] as the plan's ids.

    x: [..., D] with T rows, float32/bfloat16/float16 (float64 on the reference). gamma: [D] in the dtype of x or float32;
    offset + gamma scales (Gemma: offset=1.0). banks: a LoraBank from D, or several over the same adapters whose layers
    share xn (q, k, v or gate, up); their B, scale and bias are not read. plan: GroupPlan over the adapters, -1 = xn only.
    sites: one per bank, None = 0, 1, ...; training, dropout_mode: dropout of the banks, as in lora_linear. xn itself
    is never dropped.
    casting: "llama" rounds x / rms to the dtype of x before gamma multiplies it, as transformers' LlamaRMSNorm does;
    "gemma" rounds the product alone, as GemmaRMSNorm does; None = "gemma" with an offset, else "llama".
    Raises TypeError/ValueError naming what does not fit.
    """
    op = "rmsnorm_lora_shrink"
    banks = list(banks) if isinstance(banks, (list, tuple)) else [banks]
    sites = list(range(len(banks)) if sites is None else sites)
    casting = casting or ("gemma" if offset else "llama")
    if not banks or len(sites) != len(banks):
        raise ValueError(f"{op}: got {len(banks)} banks and {len(sites)} sites; give one site per bank, at least one")
    if casting not in CASTING:
        raise ValueError(f"{op}: casting is {casting!r}; give {' or '.join(map(repr, CASTING))}, or None")
    rows = [_lora.rows_of(op, x, bank, plan) for bank in banks][0]
    _check_gamma(op, gamma, x)
    shrink = _lora.shrink_args(op, banks, plan, sites, training, dropout_mode)
    xn, s, *_ = _op(rows, gamma, eps, offset, casting == "llama", *shrink, _lora.main_grads(banks, "A"), _backends.requested(backend))
    return xn.view(x.shape), s.view(*plan.shape, s.shape[1])


def _check_gamma(op, gamma, x):
    if type(gamma).__name__ == "DTensor":
        raise TypeError(f"{op}: gamma is a DTensor; shard by decoder layer so that it is a plain tensor in forward")
    if not isinstance(gamma, torch.Tensor) or gamma.shape != x.shape[-1:]:
        got = tuple(gamma.shape) if isinstance(gamma, torch.Tensor) else type(gamma).__name__
        raise ValueError(f"{op}: gamma is {got}; x takes {tuple(x.shape[-1:])}")
    if gamma.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: gamma is {gamma.dtype}, x is {x.dtype}; give gamma in the dtype of x or float32")
    if gamma.device != x.device:
        raise ValueError(f"{op}: gamma is on {gamma.device}, x on {x.device}; move them to one device")
