"""lora_linear, lora_linear_group, lora_delta, lora_delta_group, lora_fan_out: batched heterogeneous LoRA.

Formula    row t, its adapters i with gates c:  y = x W^T + b + sum_i c_i s_i ((M o x) A_i^T B_i^T + beta_i)
           M keeps an element with probability 1 - p_i and divides it by that, replayed from Philox (reference/philox.py)
Shapes     x [..., D] with T rows, weight [O, D], bias [O], A_i [R_i, D], B_i [O, R_i], beta_i [O]; any R_i >= 0;
           ids of the plan [T], or [T, K] for K adapters a row; gates as the ids
Gradients  x, weight, bias, gates, the bank's scale and every A_i, B_i, beta_i (zeros for adapters without rows)
Backends   reference, cpu, triton. No CUDA C++: the GEMMs want wgmma and TMA, which come through Triton
Cost       saved: x, S [T, max R] per target; never a dropped copy of x, or W + BA; of a mask, with dropout_mode="bitmask" (which
           "auto" takes on sm_100 alone), one bit for each element of x and target
           moved, in elements, beside factors and S: 2TD + TO + DO forward, 2TD + 2TO + DO backward where base and adapters
           share a kernel (docs/lora.md: when that is), else another 2TO and 2TD

    y = lora_linear(x, weight, bias, bank, plan)
    q, k, v = lora_linear_group(x, weights, biases, banks, plan)
"""

from types import ModuleType

import torch
import torch.nn.functional as F

from .. import _backends, _native
from .._op import below_autograd, load, pack, register, save, unpack
from ..bank import views_A, views_B
from . import _lora
from .group_plan import group_plan
from .lora_expand import lora_expand
from .lora_shrink import lora_shrink

_ARGS = f"{_lora.BANK}, Tensor? gates, {_lora.PLAN}, int[] sites, int dropout"


def _launchers(x, A, backend):
    return _lora.launchers("lora", x, A[0], backend)


def _own_base(run, x, batch_invariant):
    """Whether the shared base takes our kernel: when its bits must not depend on T, or torch's matmul is slow here (but a row or two are a gemv)."""
    if batch_invariant:
        return hasattr(run, "lora_base_linear")
    return _native.available() and run is _native.ops() and len(x) > 3 and not _native.fast_matmul(x.dtype)


def _fuses_base(run, rows, A, inner, perm, n_adapters, batch_invariant):
    """Whether base and adapters share a kernel: with one adapter a row, if asked for or if the GPU's limits promise time for it."""
    if not isinstance(run, ModuleType) or not hasattr(run, "fuses") or len(perm) != len(rows):
        return False
    return batch_invariant or run.fuses(rows, A[0], inner, n_adapters)


def _linear_kernel(x, weight, bias, A, B, lora_bias, scale, threshold, seeds, ranks, layouts, gates, *rest):
    ids, *groups, sites, dropout, batch_invariant, main_grad, backend = rest
    run, bias = _launchers(x, A, backend), [b if b.numel() else None for b in bias] or [None] * len(weight)
    bits = _lora.new_bits(dropout, x, A[0], groups[1], len(weight), backend)
    views = _lora.factors_A(A, ranks, layouts), _lora.factors_B(B, ranks, layouts)
    lora = *views, lora_bias, scale, threshold, seeds, gates, *groups, sites, bool(dropout)
    if _fuses_base(run, x, A, x.shape[1], groups[1], len(ranks) // len(weight), batch_invariant):
        return *run.lora_linear_fwd(x, weight, bias, *lora, _lora.kept(bits)), bits
    linear, weight = (run.lora_base_linear, _dense_rows(weight)) if _own_base(run, x, batch_invariant) else (F.linear, weight)
    ys = [linear(x, w, b) for w, b in zip(weight, bias)]
    return ys, run.lora_fwd(x, *lora, ys, _lora.kept(bits)), bits


def _delta_kernel(x, out, A, B, lora_bias, scale, threshold, seeds, ranks, layouts, gates, *rest):
    ids, *groups, sites, dropout, main_grad, backend = rest
    views = _lora.factors_A(A, ranks, layouts), _lora.factors_B(B, ranks, layouts)
    ys = [y.clone(memory_format=torch.contiguous_format) for y in out] or [x.new_zeros(len(x), n) for n in _widths(B, ranks, layouts)]
    bits = _lora.new_bits(dropout, x, A[0], groups[1], len(layouts), backend)
    lora = *views, lora_bias, scale, threshold, seeds, gates, *groups, sites, bool(dropout)
    return ys, _launchers(x, A, backend).lora_fwd(x, *lora, ys, _lora.kept(bits)), bits


def _widths(B, ranks, layouts):
    return [b.shape[0] for b in _lora.factors_B(B, ranks, layouts)[:: len(ranks) // len(layouts)]]


def _bwd_kernel(dys, x, weight, s, bits, A, B, lora_bias, scale, threshold, seeds, ranks, layouts, gates, *rest):
    ids, *groups, sites, dropout, need_dx, need, need_gates, need_scale, fp32_grads, batch_invariant, backend = rest
    run, nA, nB = _launchers(x, A, backend), len(A), len(B)
    dtype = _lora.grad_dtype(fp32_grads, A)
    grads_A, dA = _lora.new_grads(A, views_A, need[:nA], ranks, layouts, dtype)
    grads_B, dB = _lora.new_grads(B, views_B, need[nA : nA + nB], ranks, layouts, dtype)
    dbias = _lora.new_bias_grads(lora_bias, need[nA + nB :], dtype)
    e = _lora.new_e(dys[0], scale, groups[1], need_gates or need_scale)
    views = _lora.factors_A(A, ranks, layouts), _lora.factors_B(B, ranks, layouts)
    lora = *views, lora_bias, scale, threshold, seeds, gates, *groups, sites, bool(dropout)
    widest = max([w.shape[0] for w in weight], default=0)
    if need_dx and weight and _fuses_base(run, dys[0], A, widest, groups[1], len(ranks) // len(weight), batch_invariant):
        dx = run.lora_linear_bwd(dys, weight, x, s, *lora, e, dA, dB, dbias, bits)
    else:
        dx = _base_dx(run, dys, weight, x, batch_invariant) if need_dx else None
        run.lora_bwd(dys, x, s, *lora, dx, e, dA, dB, dbias, bits)
    small = _lora.gate_and_scale_grads(e, scale, gates, ids, *groups[:3], need_gates, need_scale, backend)
    return x.new_empty(0) if dx is None else dx, *small, [*grads_A, *grads_B, *dbias]


def _base_dx(run, dys, weight, x, batch_invariant):
    if not weight:
        return x.new_zeros(x.shape)
    if _own_base(run, x, batch_invariant):
        return run.lora_base_dx(dys, _dense_rows(weight))
    dx = dys[0] @ weight[0]
    for dy, w in zip(dys[1:], weight[1:]):
        dx.addmm_(dy, w)
    return dx


def _dense_rows(weight):
    return [w if w.stride(1) == 1 else w.contiguous() for w in weight]


def _kept_fake(x, A, ranks, layouts, perm, dropout, backend):
    s = x.new_empty(perm.shape[0], _lora.s_width(ranks, len(layouts)), dtype=_lora.s_dtype(x, A))
    return s, _lora.new_bits(dropout, x, A[0], perm, len(layouts), backend)


def _linear_fake(x, weight, bias, A, B, lora_bias, scale, threshold, seeds, ranks, layouts, gates, ids, offsets, perm, tiles, step, sites, dropout, *rest):
    return [x.new_empty(x.shape[0], w.shape[0]) for w in weight], *_kept_fake(x, A, ranks, layouts, perm, dropout, rest[-1])


def _delta_fake(x, out, A, B, lora_bias, scale, threshold, seeds, ranks, layouts, gates, ids, offsets, perm, tiles, step, sites, dropout, *rest):
    return [x.new_empty(x.shape[0], n) for n in _widths(B, ranks, layouts)], *_kept_fake(x, A, ranks, layouts, perm, dropout, rest[-1])


def _bwd_fake(dys, x, weight, s, bits, A, B, lora_bias, scale, threshold, seeds, ranks, layouts, gates, ids, *rest):
    need_dx, need, need_gates, need_scale, fp32_grads, _, _ = rest[-7:]
    dscale = [t.new_empty(t.shape if need_scale else 0) for t in scale]
    grads = _lora.fake_grads((*A, *B, *lora_bias), need, fp32_grads)
    return x.new_empty(x.shape if need_dx else 0), scale[0].new_empty(ids.shape if need_gates else 0), dscale, grads


class _Lora(torch.autograd.Function):
    """The LoRA part shared by both ops. Their arguments: x, a head (weight and bias, or out), the LoRA arguments from A on."""

    @staticmethod
    def save(ctx, spec, x, weight, s, bits, needs, rest):
        """needs: which of `rest`, the arguments from A on, want a gradient; x is kept for dA, and for dW by its own need."""
        *rest, ctx.main_grad, backend = rest
        *rest, batch_invariant = rest
        ctx.spec, ctx.options, ctx.width = spec, (bool(ctx.main_grad), batch_invariant, backend), x.shape[1]
        keeps_x = any(needs[0]) or any(weight and unpack(spec, ctx.needs_input_grad[1:])[1])
        save(ctx, x if keeps_x else None, weight, s, _lora.kept(bits), *rest)
        ctx.mark_non_differentiable(s, bits)
        ctx.set_materialize_grads(False)

    @staticmethod
    def grads(ctx, dys, saved, need_x, needs):
        """(dx, gradients from A on up to the gates), flat."""
        x, weight, s, bits, *rest = saved
        need_A, need_B, need_bias, need_scale, _, _, _, _, need_gates, *_ = needs
        need = [*need_A, *need_B, *(need_bias or [])]
        if x is None:  # only its shape is read
            x = dys[0].new_empty(1, ctx.width).expand(dys[0].shape[0], -1)
        small = need_gates, any(need_scale)
        dx, dgates, dscale, grads = _bwd_op(dys, x, weight, s, bits, *rest, need_x, need, *small, *ctx.options)
        grads = _lora.returned(ctx.main_grad, grads, need)
        n = len(need_A) + len(need_B)
        bias = grads[n:] if need_bias else [None]
        dscale = [g if wanted else None for g, wanted in zip(dscale, need_scale)]
        constants = [None] * (2 * len(need_scale) + 2)  # threshold, seeds, ranks, layouts
        return dx if need_x else None, [*grads[:n], *bias, *dscale, *constants, dgates if need_gates else None]

    @staticmethod
    def pad(ctx, *found):
        return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


class _LoraLinear(_Lora):
    @staticmethod
    def forward(ctx, spec, *flat):
        args = unpack(spec, flat)
        with below_autograd():
            ys, s, bits = _linear_op(*args)
        needs = unpack(spec, ctx.needs_input_grad[1:])
        _Lora.save(ctx, spec, args[0], args[1], s, bits, needs[3:], args[3:])
        return *ys, s, bits

    @staticmethod
    def backward(ctx, *dys):
        if all(dy is None for dy in dys):
            return (None,) * len(ctx.needs_input_grad)
        need_x, need_w, need_b, *needs = unpack(ctx.spec, ctx.needs_input_grad[1:])
        x, weight, *_ = saved = load(ctx)
        dys = _dense(dys, [w.shape[0] for w in weight])
        dx, grads = _Lora.grads(ctx, dys, saved, need_x, needs)
        dw = [dy.T @ x if wanted else None for dy, wanted in zip(dys, need_w)]
        db = [dy.sum(0) if wanted else None for dy, wanted in zip(dys, need_b)] if need_b else [None]
        return _Lora.pad(ctx, None, dx, *dw, *db, *grads)


class _LoraDelta(_Lora):
    @staticmethod
    def forward(ctx, spec, *flat):
        args = unpack(spec, flat)
        with below_autograd():
            ys, s, bits = _delta_op(*args)
        needs = unpack(spec, ctx.needs_input_grad[1:])
        *rest, main_grad, backend = args[2:]
        _Lora.save(ctx, spec, args[0], [], s, bits, needs[2:], [*rest, False, main_grad, backend])
        ctx.widths = [y.shape[1] for y in ys]
        return *ys, s, bits

    @staticmethod
    def backward(ctx, *dys):
        if all(dy is None for dy in dys):
            return (None,) * len(ctx.needs_input_grad)
        need_x, need_out, *needs = unpack(ctx.spec, ctx.needs_input_grad[1:])
        dys = _dense(dys, ctx.widths)
        dx, grads = _Lora.grads(ctx, dys, load(ctx), need_x, needs)
        dout = [dy if wanted else None for dy, wanted in zip(dys, need_out)] if need_out else [None]
        return _Lora.pad(ctx, None, dx, *dout, *grads)


def _dense(dys, widths):
    """Gradients of the outputs, zeros for one that was not used."""
    lead = next(dy for dy in dys if dy is not None)
    return [lead.new_zeros(len(lead), n) if dy is None else dy.contiguous() for dy, n in zip(dys, widths)]


def _linear_autograd(*args):
    flat, spec = pack(args)
    *ys, s, bits = _LoraLinear.apply(spec, *flat)
    return ys, s, bits


def _delta_autograd(*args):
    flat, spec = pack(args)
    *ys, s, bits = _LoraDelta.apply(spec, *flat)
    return ys, s, bits


_LISTS = ("x", "A", "B", "lora_bias")
_linear_op = register(
    "lora",
    f"lora_linear(Tensor x, Tensor[] weight, Tensor[] bias, {_ARGS}, bool batch_invariant, {_lora.MAIN_GRAD}, str backend) -> (Tensor[] y, Tensor s, Tensor bits)",
    kernel=_linear_kernel,
    fake=_linear_fake,
    autograd=_linear_autograd,
    autocast=(*_LISTS, "weight", "bias"),
)
_delta_op = register(
    "lora",
    f"lora_delta(Tensor x, Tensor[] out, {_ARGS}, {_lora.MAIN_GRAD}, str backend) -> (Tensor[] y, Tensor s, Tensor bits)",
    kernel=_delta_kernel,
    fake=_delta_fake,
    autograd=_delta_autograd,
    autocast=(*_LISTS, "out"),
)
_bwd_op = register(
    "lora",
    f"lora_bwd(Tensor[] dys, Tensor x, Tensor[] weight, Tensor s, Tensor? bits, {_ARGS}, bool need_dx, bool[] need, bool need_gates, bool need_scale,"
    " bool fp32_grads, bool batch_invariant, str backend) -> (Tensor dx, Tensor dgates, Tensor[] dscale, Tensor[] grads)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)


def lora_linear(x, weight, bias, bank, plan, *, training=True, site=0, gates=None, mid=None, batch_invariant=False, dropout_mode="auto", backend=None):
    """y [..., O] = x W^T + bias, plus each row's own adapters.

    x: [..., D] with T rows in all, float32/bfloat16/float16 (float64 on the reference). weight [O, D], bias [O] or None:
        dtype of x. bank: LoraBank over D -> O; its dtype may differ from x (fp32 adapters over bf16 activations: the
        LoRA part is computed in the wider type). plan: GroupPlan of ids [T], or [T, K] for several adapters a row, over
        len(bank) adapters; -1 = base only.
    training: apply the bank's dropout. site: distinguishes the layers that share a plan, so that their masks differ.
    gates: float of the plan's shape, multiplies each adapter's part of each row; differentiable; None = 1.
    mid: a map in rank space (mtkernels.mid), between A and B: MTL-LoRA, HydraLoRA, bottleneck adapters and so on.
    batch_invariant: take our fixed-order kernel for the base too, so that a row's bits do not depend on the others.
    dropout_mode: "replay" draws the masks again in backward, "bitmask" keeps them, a bit for each element of x; "auto" takes
        what should be faster on this device (docs/lora.md). The same masks, and the same bits in every result.
    Raises TypeError/ValueError naming what does not fit.
    """
    if mid is not None:
        _refuse_beside_mid("lora_linear", gates=gates, batch_invariant=batch_invariant or None)
        base = F.linear(x, weight, bias)
        return _through(mid, x, bank, plan, base, training=training, site=site, dropout_mode=dropout_mode, backend=backend)
    options = dict(training=training, sites=(site,), gates=gates, batch_invariant=batch_invariant, dropout_mode=dropout_mode, backend=backend)
    return _linear("lora_linear", x, [weight], [bias], [bank], plan, **options)[0]


def lora_linear_group(x, weights, biases, banks, plan, *, training=True, sites=None, gates=None, batch_invariant=False, dropout_mode="auto", backend=None):
    """A tuple of y_g [..., O_g] as lora_linear would give them one by one, with one read of x: QKV, or gate and up.

    weights, biases, banks: one per target, over the same adapters; widths O_g and ranks may differ, biases may be None.
    sites: one per target, None = 0, 1, ...; equal sites and seeds share a dropout mask. Others as in lora_linear.
    """
    weights, banks = list(weights), list(banks)
    biases = [None] * len(weights) if biases is None else list(biases)
    sites = range(len(weights)) if sites is None else sites
    if not weights or not len(weights) == len(biases) == len(banks) == len(sites):
        got = f"{len(weights)} weights, {len(biases)} biases, {len(banks)} banks and {len(sites)} sites"
        raise ValueError(f"lora_linear_group: got {got}; give one of each per target, at least one")
    options = dict(training=training, sites=sites, gates=gates, batch_invariant=batch_invariant, dropout_mode=dropout_mode, backend=backend)
    return _linear("lora_linear_group", x, weights, biases, banks, plan, **options)


def _linear(op, x, weights, biases, banks, plan, *, training, sites, gates, batch_invariant, dropout_mode, backend):
    for g, (weight, bias, bank) in enumerate(zip(weights, biases, banks)):
        rows = _lora.rows_of(op, x, bank, plan)
        which = f"[{g}]" if len(banks) > 1 else ""
        if weight.shape != (bank.out_features, bank.in_features):
            raise ValueError(f"{op}: weight{which} is {tuple(weight.shape)}, the bank maps {bank.in_features} -> {bank.out_features}; weight is [O, D]")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias{which} is {tuple(bias.shape)}; give {tuple(weight.shape[:1])} or None")
        for name, t in ((f"weight{which}", weight), (f"bias{which}", bias)):
            _lora.check_like(op, name, t, x)
    bias = [x.new_empty(0) if b is None else b for b in biases] if any(b is not None for b in biases) else []
    gates, groups = _lora.flat_gates(op, gates, plan, banks[0].scale), _lora.plan_args(plan)
    options = list(sites), _lora.dropout_arg(op, banks, training, dropout_mode), batch_invariant, _lora.main_grads(banks, "A", "B", "bias"), _backends.requested(backend)
    ys, *_ = _linear_op(rows, weights, bias, *_lora.bank_args(op, banks), gates, *groups, *options)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def lora_delta(x, bank, plan, out=None, *, training=True, site=0, gates=None, mid=None, dropout_mode="auto", backend=None):
    """The LoRA part alone, or out + it: for a base that is quantised, sharded or computed elsewhere.

    x: [..., D] with T rows; out: [..., O] or None, never written; the rest as in lora_linear. Returns [..., O].
    """
    if mid is not None:
        _refuse_beside_mid("lora_delta", gates=gates)
        return _through(mid, x, bank, plan, out, training=training, site=site, dropout_mode=dropout_mode, backend=backend)
    outs = None if out is None else [out]
    options = dict(training=training, sites=(site,), gates=gates, dropout_mode=dropout_mode, backend=backend)
    return _delta("lora_delta", x, [bank], plan, outs, **options)[0]


def lora_delta_group(x, banks, plan, outs=None, *, training=True, sites=None, gates=None, dropout_mode="auto", backend=None):
    """A tuple of lora_delta's results for several targets, with one read of x; outs: one per target, or None."""
    banks = list(banks)
    sites = range(len(banks)) if sites is None else sites
    if not banks or len(sites) != len(banks) or outs is not None and len(outs) != len(banks):
        got = f"{len(banks)} banks, {len(sites)} sites and {'no' if outs is None else len(outs)} outs"
        raise ValueError(f"lora_delta_group: got {got}; give one of each per target, at least one")
    options = dict(training=training, sites=sites, gates=gates, dropout_mode=dropout_mode, backend=backend)
    return _delta("lora_delta_group", x, banks, plan, outs, **options)


def lora_fan_out(x, weight, bias, bank, *, plan=None, training=True, site=0, dropout_mode="auto", backend=None):
    """One output per adapter (MTLoRA's task outputs): a tuple of x W^T + bias + s_i B_i A_i x, [..., O] each.

    plan: a GroupPlan over one group that says which rows take part (id 0; -1 = base only); None = all.
    Every adapter draws its own mask (site, site + 1, ...). The base and the read of x are shared.
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1:].numel() else 0
    plan = group_plan(torch.zeros(rows, dtype=torch.int32, device=x.device), 1, backend=backend) if plan is None else plan
    base, sites = F.linear(x, weight, bias), range(site, site + len(bank))
    options = dict(training=training, sites=sites, gates=None, dropout_mode=dropout_mode, backend=backend)
    return _delta("lora_fan_out", x, bank.split(), plan, [base] * len(bank), **options)


def _through(mid, x, bank, plan, out, *, training, site, dropout_mode, backend):
    s = lora_shrink(x, bank, plan, training=training, site=site, dropout_mode=dropout_mode, backend=backend)
    u, bank, plan, gates = mid(s, bank, plan)
    y = lora_expand(u, bank, plan, out, gates=gates, backend=backend)
    return y if out is not None else y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def _refuse_beside_mid(op, **options):
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{op}: {name}= does not go with mid=; a mid returns its own gates, and its base is torch's linear")


def _delta(op, x, banks, plan, outs, *, training, sites, gates, dropout_mode, backend):
    rows = [_lora.rows_of(op, x, bank, plan) for bank in banks][0]
    shapes = [(*x.shape[:-1], bank.out_features) for bank in banks]
    for out, shape in zip(outs or (), shapes):
        if out.shape != shape:
            raise ValueError(f"{op}: out is {tuple(out.shape)}; x and the bank give {shape}")
        _lora.check_like(op, "out", out, x)
    outs = [out.reshape(-1, out.shape[-1]) for out in outs or ()]
    gates, groups = _lora.flat_gates(op, gates, plan, banks[0].scale), _lora.plan_args(plan)
    options = list(sites), _lora.dropout_arg(op, banks, training, dropout_mode), _lora.main_grads(banks, "A", "B", "bias"), _backends.requested(backend)
    ys, *_ = _delta_op(rows, outs, *_lora.bank_args(op, banks), gates, *groups, *options)
    return tuple(y.view(shape) for y, shape in zip(ys, shapes))
