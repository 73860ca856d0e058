"""moe_lora_linear: LoRA on the weights of experts, for rows sorted once by (expert, adapter).

Formula    position (t, k) of expert e and its adapter a:  z_tk = x W_e^T + b_e + s ((M o x) A^T B^T + beta), x = x_t or x_tk;
           without gates y_tk = z_tk, with them y_t = sum_k c_tk z_tk, k ascending. M as in lora_linear
Shapes     x [T, D], or [T, K, D] with a row of its own for every position; weight [E, O, D], bias [E, O]; bank of E A adapters,
           adapter a of expert e at e A + a; plan over E (A + 1) groups of ids [T, K] or [T] (expert_adapter_ids makes them);
           gates as the ids -> y [T, K, O] (or [T, O] for ids [T]), with gates [T, O]
Gradients  x, gates, the bank's scale and every A, B, beta (zeros for adapters without positions). W and b are frozen
Backends   reference, cpu, triton. No CUDA C++: the GEMMs want wgmma and TMA, which come through Triton
Cost       saved: x, S [P, max R], with dropout_mode="bitmask" D bits a position; never z, a gathered copy of x, or W + BA. The
           gate's gradient is (dy W_e) . x + dy . b_e + s e, from products that the gradient of x needs anyway. GPU: 2 launches
           forward, 4 backward; one more in either to sum over K, and one for the gradient of gates

    plan = group_plan(expert_adapter_ids(experts, adapters, A), E * (A + 1))
    h = moe_lora_linear(x, w_up, None, up_bank, plan)                                    # [T, K, O]
    y = moe_lora_linear(act(h), w_down, None, down_bank, plan, gates=router_weights)     # [T, D]
"""

import torch

from .. import _backends
from .._op import below_autograd, load, pack, register, save, unpack
from ..bank import views_A, views_B
from ..plan import check_plan
from . import _lora

_ARGS = f"Tensor x, Tensor weight, Tensor? bias, {_lora.BANK}, Tensor? gates, {_lora.PLAN}, int[] sites, int dropout"


def _launchers(x, A, backend):
    return _lora.launchers("moe_lora_linear", x, A[0], backend)


def _with_none(n_experts, *lists):
    """Each expert's tensors followed by one of rank 0, for the positions that have no adapter."""
    found = []
    for tensors, none in lists:
        n = len(tensors) // n_experts
        found.append([t for e in range(n_experts if n else 0) for t in (*tensors[e * n : (e + 1) * n], none)])
    return found


def _factors(weight, A, B, lora_bias, ranks, layouts):
    E, O, D = weight.shape
    none_A, none_B = A[0].new_empty(0, D), B[0].new_empty(O, 0)
    return _with_none(E, (_lora.factors_A(A, ranks, layouts), none_A), (_lora.factors_B(B, ranks, layouts), none_B), (lora_bias, A[0].new_empty(0)))


def _kernel(x, weight, bias, A, B, lora_bias, scale, threshold, seeds, ranks, layouts, gates, ids, *rest):
    *groups, (site,), dropout, main_grad, backend = rest
    lora = *_factors(weight, A, B, lora_bias, ranks, layouts), *scale, *threshold, *seeds, gates, *groups, site, bool(dropout)
    bits = _lora.new_bits(dropout, x, A[0], groups[1], 1, backend)
    return *_launchers(x, A, backend).moe_lora_linear_fwd(x, weight, bias, *lora, _lora.kept(bits)), bits


def _bwd_kernel(dy, s, bits, x, weight, bias, A, B, lora_bias, scale, threshold, seeds, ranks, layouts, gates, ids, *rest):
    *groups, (site,), dropout, need_dx, need, need_gates, need_scale, fp32_grads, backend = rest
    nA, nB, E = len(A), len(B), len(weight)
    dtype = _lora.grad_dtype(fp32_grads, A)
    grads_A, dA = _lora.new_grads(A, views_A, need[:nA], ranks, layouts, dtype)
    grads_B, dB = _lora.new_grads(B, views_B, need[nA : nA + nB], ranks, layouts, dtype)
    dbias, nothing = _lora.new_bias_grads(lora_bias, need[nA + nB :], dtype), A[0].new_empty(0, dtype=dtype)
    dx, dgates = x.new_empty(x.shape) if need_dx else None, torch.empty_like(gates) if need_gates else None
    e = _lora.new_e(dy, scale, groups[1], need_gates or need_scale)
    lora = *_factors(weight, A, B, lora_bias, ranks, layouts), *scale, *threshold, *seeds, gates, *groups, site, bool(dropout)
    written = _with_none(E, (dA, nothing), (dB, nothing), (dbias, nothing))
    _launchers(x, A, backend).moe_lora_linear_bwd(dy, x, weight, bias, s, *lora, dx, dgates, e, *written, bits)
    _, dscale = _lora.gate_and_scale_grads(e, scale, gates if gates is None else gates.view(-1), ids, *groups[:3], False, need_scale, backend)
    dscale = [g.view(E, -1)[:, :-1].reshape(-1) for g in dscale] if need_scale else dscale
    empty = scale[0].new_empty(0)
    return x.new_empty(0) if dx is None else dx, empty if dgates is None else dgates, dscale, [*grads_A, *grads_B, *dbias]


def _fake(x, weight, bias, A, B, lora_bias, scale, threshold, seeds, ranks, layouts, gates, ids, offsets, perm, tiles, step, sites, dropout, main_grad, backend):
    n_rows, bits = perm.shape[0] if gates is None else gates.shape[0], _lora.new_bits(dropout, x, A[0], perm, 1, backend)
    return x.new_empty(n_rows, weight.shape[1]), x.new_empty(perm.shape[0], max(ranks), dtype=_lora.s_dtype(x, A)), bits


def _bwd_fake(dy, s, bits, x, weight, bias, A, B, lora_bias, scale, threshold, seeds, ranks, layouts, gates, *rest):
    need_dx, need, need_gates, need_scale, fp32_grads, _ = rest[-6:]
    dscale = [t.new_empty(t.shape if need_scale else 0) for t in scale]
    grads = _lora.fake_grads((*A, *B, *lora_bias), need, fp32_grads)
    return x.new_empty(x.shape if need_dx else 0), scale[0].new_empty(gates.shape if need_gates else 0), dscale, grads


def _needs(ctx):
    """Which want a gradient: x, every A, every B, every beta ([] without), the scale ([of the one target]), gates."""
    need_x, _, _, need_A, need_B, need_bias, need_scale, _, _, _, _, need_gates, *_ = unpack(ctx.spec, ctx.needs_input_grad[1:])
    return need_x, need_A, need_B, need_bias or [], need_scale, need_gates


class _MoeLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, *flat):
        args = unpack(spec, flat)
        with below_autograd():
            y, s, bits = _op(*args)
        x, *rest, ctx.main_grad, ctx.backend = args
        ctx.spec, ctx.x_shape = spec, x.shape
        _, need_A, *_, need_gates = _needs(ctx)
        save(ctx, x if any(need_A) or need_gates else None, s, _lora.kept(bits), *rest)
        ctx.mark_non_differentiable(s, bits)
        ctx.set_materialize_grads(False)
        return y, s, bits

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, s, bits, *rest = load(ctx)
        if x is None:  # only its shape is read
            x = dy.new_empty(1, ctx.x_shape[1]).expand(ctx.x_shape)
        need_x, need_A, need_B, need_bias, need_scale, need_gates = _needs(ctx)
        need = [*need_A, *need_B, *need_bias]
        wanted = need_x, need, need_gates, any(need_scale), bool(ctx.main_grad)
        dx, dgates, dscale, grads = _bwd_op(dy.contiguous(), s, bits, x, *rest, *wanted, ctx.backend)
        grads = _lora.returned(ctx.main_grad, grads, need) + [None] * (not need_bias)
        dscale = [g if w else None for g, w in zip(dscale, need_scale)]
        # weight, bias; then threshold, seeds, ranks, layouts
        found = [None, dx if need_x else None, None, None, *grads, *dscale, *[None] * 4, dgates if need_gates else None]
        return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def _autograd(*args):
    flat, spec = pack(args)
    return _MoeLoraLinear.apply(spec, *flat)


_op = register(
    "moe_lora_linear",
    f"moe_lora_linear({_ARGS}, {_lora.MAIN_GRAD}, str backend) -> (Tensor y, Tensor s, Tensor bits)",
    kernel=_kernel,
    fake=_fake,
    autograd=_autograd,
    autocast=("x", "weight", "bias", "A", "B", "lora_bias"),
)
_bwd_op = register(
    "moe_lora_linear",
    f"moe_lora_linear_bwd(Tensor dy, Tensor s, Tensor? bits, {_ARGS}, bool need_dx, bool[] need, bool need_gates, bool need_scale, bool fp32_grads, str backend)"
    " -> (Tensor dx, Tensor dgates, Tensor[] dscale, Tensor[] grads)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)


def moe_lora_linear(x, weight, bias, bank, plan, *, gates=None, training=True, site=0, dropout_mode="auto", backend=None):
    """A linear layer of E experts with LoRA adapters on each, mixed in one batch.

    x: [T, D], a row for all its experts, or [T, K, D], a row for each position of the plan; float32/bfloat16/float16 (float64
        on the reference). weight: [E, O, D] and bias: [E, O] or None, dtype of x, frozen; a weight with unit stride along O or
        D is read as it is. bank: LoraBank over D -> O of E * A adapters, adapter a of expert e at index e * A + a; its dtype may
        differ from x, as in lora_linear.
    plan: GroupPlan over E * (A + 1) groups of ids [T, K] or [T]: e * (A + 1) + a, where a = A means expert e without adapter; -1 =
        no expert, exact zeros. `expert_adapter_ids` makes them.
    gates: None, or float of the plan's shape: the weights with which the K results of a row are summed, in float32, rounded once.
    training, site, dropout_mode: dropout, as in lora_linear; a position counts among those of its (expert, adapter).
    Returns [*plan.shape, O], with gates [T, O]. No bit of a group's results or gradients depends on the other groups.
    Raises TypeError/ValueError naming what does not fit, a weight or bias that requires grad among them.
    """
    op = "moe_lora_linear"
    rows = _lora.bank_rows(op, x, bank)
    _check_experts(op, x, weight, bias, bank, plan)
    if 1 not in weight.stride()[1:]:
        weight = weight.contiguous()
    groups, flat = _lora.plan_args(plan), _lora.flat_gates(op, gates, plan, bank.scale)
    gates = None if gates is None else flat.view(plan.n_rows, plan.shape[1] if len(plan.shape) > 1 else 1)
    options = [site], _lora.dropout_arg(op, [bank], training, dropout_mode), _lora.main_grads([bank], "A", "B", "bias"), _backends.requested(backend)
    y, *_ = _op(rows, weight, bias, *_lora.bank_args(op, [bank]), gates, *groups, *options)
    return y.view(*plan.shape, y.shape[1]) if gates is None else y


def _check_experts(op, x, weight, bias, bank, plan):
    O, D = bank.out_features, bank.in_features
    if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or weight.shape[1:] != (O, D):
        got = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"{op}: weight is {got}, the bank maps {D} -> {O}; weight is [E, {O}, {D}]")
    E = len(weight)
    if not E or len(bank) % E:
        raise ValueError(f"{op}: the bank has {len(bank)} adapters for {E} experts; give the same number, at least one, for each expert")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"{op}: bias is {tuple(bias.shape)}; give {tuple(weight.shape[:2])} or None")
    for name, t in (("weight", weight), ("bias", bias)):
        _lora.check_like(op, name, t, x)
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} requires grad, but the experts are frozen in this op; pass {name}.detach(), and train it elsewhere")
    n = len(bank) // E
    check_plan(op, plan, E * (n + 1), x.shape[0], x.device, f"of {E} experts, each with {n} adapters or none", slots=True)
    if x.shape[:-1] not in (plan.shape, plan.shape[:1]):
        raise ValueError(f"{op}: x is {tuple(x.shape)} for ids {tuple(plan.shape)}; give a row per id, {(*plan.shape, D)}, or per row, {(plan.n_rows, D)}")
