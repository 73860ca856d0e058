"""swiglu_lora_shrink: the gated product of an MLP that hands its result to a LoRA layer in rank space too; lora_swiglu_mlp.

Formula    h = act(gate) o up, act(gate) and h rounded to their dtype;  s[p] = (M o h[row of p]) A_i^T for position p of
           adapter i, zeros right of its rank and where no adapter is
Shapes     gate, up [..., D] with T rows, ids of the plan [T] or [T, K] -> h [..., D], s [T, R] or [T, K, R], R the largest rank
Gradients  gate, up and every A_i (zeros for adapters without rows)
Backends   reference, cpu, triton. No CUDA C++: the GEMMs want wgmma and TMA, which come through Triton
Cost       reads gate and up and writes h, once each; backward reads gate, up, dh and writes dgate, dup. Saved: gate, up,
           and with dropout_mode="bitmask" one bit for each element of h; never h

    h, s = swiglu_lora_shrink(gate, up, down_bank, plan)
    y = lora_expand(s, down_bank, plan, out=F.linear(h, W_down))
    y = lora_swiglu_mlp(x, W_gate, W_up, W_down, (gate_bank, up_bank, down_bank), plan)      # the whole MLP
"""

import torch
import torch.nn.functional as F

from .. import _backends
from .._op import below_autograd, load, pack, register, save, unpack
from ..bank import views_A
from ..reference.swiglu_lora_shrink import ACTIVATIONS
from . import _lora
from .lora import lora_linear_group
from .lora_expand import lora_expand
from .rmsnorm_lora_shrink import rmsnorm_lora_shrink


def _kernel(gate, up, act, A, threshold, seeds, ranks, layouts, ids, offsets, perm, tiles, step, sites, dropout, main_grad, backend):
    run, views = _lora.launchers("swiglu_lora_shrink", gate, A[0], backend), _lora.factors_A(A, ranks, layouts)
    bits = _lora.new_bits(dropout, gate, A[0], perm, 1, backend)
    plan = offsets, perm, tiles, step, sites, bool(dropout)
    return *run.swiglu_lora_shrink_fwd(gate, up, act, views, threshold, seeds, *plan, _lora.kept(bits)), bits


def _bwd_kernel(dh, ds, gate, up, bits, act, A, threshold, seeds, ranks, layouts, ids, *rest):
    offsets, perm, tiles, step, sites, dropout, need_x, need, fp32_grads, backend = rest
    run, views = _lora.launchers("swiglu_lora_shrink", gate, A[0], backend), _lora.factors_A(A, ranks, layouts)
    dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) if need_x else None for t in (gate, up))
    grads, dA = _lora.new_grads(A, views_A, need, ranks, layouts, _lora.grad_dtype(fp32_grads, A))
    plan = offsets, perm, tiles, step, sites, bool(dropout)
    run.swiglu_lora_shrink_bwd(dh, ds, gate, up, act, views, threshold, seeds, *plan, dgate, dup, dA, bits)
    return *(gate.new_empty(0) if d is None else d for d in (dgate, dup)), grads


def _fake(gate, up, act, A, threshold, seeds, ranks, layouts, ids, offsets, perm, tiles, step, sites, dropout, main_grad, backend):
    s = gate.new_empty(perm.shape[0], max(ranks), dtype=_lora.s_dtype(gate, A))
    return gate.new_empty(gate.shape), s, _lora.new_bits(dropout, gate, A[0], perm, 1, backend)


def _bwd_fake(dh, ds, gate, up, bits, act, A, *rest):
    need_x, need, fp32_grads, _ = rest[-4:]
    shape = gate.shape if need_x else 0
    return gate.new_empty(shape), gate.new_empty(shape), _lora.fake_grads(A, need, fp32_grads)


class _SwigluLoraShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, *flat):
        args = unpack(spec, flat)
        with below_autograd():
            h, s, bits = _op(*args)
        gate, up, *rest, ctx.main_grad, ctx.backend = args
        ctx.spec = spec
        save(ctx, gate, up, _lora.kept(bits), *rest)
        ctx.mark_non_differentiable(bits)
        return h, s, bits

    @staticmethod
    def backward(ctx, dh, ds, _):
        need_gate, need_up, _, need_A, *_ = unpack(ctx.spec, ctx.needs_input_grad[1:])
        dgate, dup, grads = _bwd_op(dh.contiguous(), ds.contiguous(), *load(ctx), need_gate or need_up, need_A, bool(ctx.main_grad), ctx.backend)
        dA = _lora.returned(ctx.main_grad, grads, need_A)
        found = [None, dgate if need_gate else None, dup if need_up else None, None, *dA]
        return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def _apply(*args):
    flat, spec = pack(args)
    return _SwigluLoraShrink.apply(spec, *flat)


_op = register(
    "swiglu_lora_shrink",
    f"swiglu_lora_shrink(Tensor gate, Tensor up, int act, {_lora.SHRINK}, {_lora.MAIN_GRAD}, str backend) -> (Tensor h, Tensor s, Tensor bits)",
    kernel=_kernel,
    fake=_fake,
    autograd=_apply,
    autocast=("A",),
)
_bwd_op = register(
    "swiglu_lora_shrink",
    f"swiglu_lora_shrink_bwd(Tensor dh, Tensor ds, Tensor gate, Tensor up, Tensor? bits, int act, {_lora.SHRINK}, bool need_x, bool[] need,"
    " bool fp32_grads, str backend) -> (Tensor dgate, Tensor dup, Tensor[] grads)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)


def swiglu_lora_shrink(gate, up, bank, plan, *, act="silu", training=True, site=0, dropout_mode="auto", backend=None):
    """(h [..., D], s): act(gate) * up, and its rank-space rows; s is [T, R] or [T, K, R] as the plan's ids, R the largest rank.

    gate, up: [..., D] with T rows, one shape and dtype, float32/bfloat16/float16 (float64 on the reference); any row
    stride, so the halves of one [T, 2D] tensor will do. bank: LoraBank of the layer that reads h (its B, scale and bias
    are not read). act: "silu", or "gelu_tanh" (transformers' gelu_pytorch_tanh). plan, training, site,
    dropout_mode: as in lora_shrink.
    Raises TypeError/ValueError naming what does not fit.
    """
    op = "swiglu_lora_shrink"
    rows = _lora.rows_of(op, gate, bank, plan)
    if not isinstance(up, torch.Tensor) or up.shape != gate.shape:
        got = tuple(up.shape) if isinstance(up, torch.Tensor) else type(up).__name__
        raise ValueError(f"{op}: up is {got}, gate is {tuple(gate.shape)}; give both one shape")
    if up.dtype != gate.dtype or up.device != gate.device:
        raise TypeError(f"{op}: up is {up.dtype} on {up.device}, gate is {gate.dtype} on {gate.device}; give both one dtype and device")
    up_rows = _lora.rows_of(op, up, bank, plan)
    shrink = _lora.shrink_args(op, [bank], plan, [site], training, dropout_mode)
    h, s, _ = _op(rows, up_rows, _activation(op, act), *shrink, _lora.main_grads([bank], "A"), _backends.requested(backend))
    return h.view(gate.shape), s.view(*plan.shape, s.shape[1])


def _activation(op, act):
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act is {act!r}; give {' or '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS.index(act)


def lora_swiglu_mlp(
    x, w_gate, w_up, w_down, banks, plan, *,
    biases=None, norm=None, offset=0.0, act="silu", training=True, sites=None, dropout_mode="auto", backend=None,
):  # fmt: skip
    """y [..., D]: the gated MLP of Llama, Qwen and Gemma with LoRA on its three projections.

    x: [..., D] with T rows. w_gate, w_up [H, D], w_down [D, H], and biases (gate, up, down; each [.] or None): the frozen or
    trained base. banks: three LoraBanks (gate, up, down). norm: (gamma [D], eps) of the RMSNorm before the MLP, and offset
    its offset, as in rmsnorm_lora_shrink; None = x is what the projections read. act: as in swiglu_lora_shrink.
    sites: three dropout sites, None = 0, 1, 2. plan, training, dropout_mode: as in lora_linear.
    Saved with a frozen base: x, gate, up [T, H], rank-space rows and, if dropout_mode keeps them, bits of the masks of three
    layers; not the normalised x or h.
    Raises TypeError/ValueError naming what does not fit.
    """
    banks, biases, sites = list(banks), [None] * 3 if biases is None else list(biases), list(range(3) if sites is None else sites)
    if not len(banks) == len(biases) == len(sites) == 3:
        raise ValueError(f"lora_swiglu_mlp: got {len(banks)} banks, {len(biases)} biases and {len(sites)} sites; give three of each: gate, up, down")
    options = dict(training=training, dropout_mode=dropout_mode, backend=backend)
    if norm is None:
        gate, up = lora_linear_group(x, [w_gate, w_up], biases[:2], banks[:2], plan, sites=sites[:2], **options)
    else:
        xn, s = rmsnorm_lora_shrink(x, *norm, banks[:2], plan, sites=sites[:2], offset=offset, **options)
        parts = s.split([max(bank.ranks) for bank in banks[:2]], -1)
        layers = zip(parts, (w_gate, w_up), biases, banks)
        gate, up = (lora_expand(s_g, bank, plan, F.linear(xn, w, b), backend=backend) for s_g, w, b, bank in layers)
    h, s = swiglu_lora_shrink(gate, up, banks[2], plan, act=act, site=sites[2], **options)
    return lora_expand(s, banks[2], plan, F.linear(h, w_down, biases[2]), backend=backend)
