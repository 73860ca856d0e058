"""lora_embedding: an embedding table with batched heterogeneous LoRA.

Formula    y[t] = W[token t] + sum over the row's adapters i of c_i s_i (B_i A_i[:, token t] + beta_i), c_i its gate
Shapes     ids [...] with T tokens, weight [V, O], A_i [R_i, V], B_i [O, R_i]; ids of the plan [T] or [T, K] -> y [..., O]
Gradients  weight, gates, the scale and every A_i, B_i, beta_i (dense; exact zeros for adapters and tokens without rows)
Backends   reference, cpu, triton. No CUDA C++: the gathers are bound by memory, and the GEMM comes through Triton
Cost       reads one column of A_i per position; saved: ids, s [T, max R]. The backward sorts (adapter, token) pairs

    y = lora_embedding(input_ids, embed.weight, bank, plan, padding_idx=embed.padding_idx)
"""

import torch
import torch.nn.functional as F

from .. import _backends
from .._op import below_autograd, load, pack, register, save, unpack
from ..bank import views_A, views_B
from ..plan import check_plan
from . import _lora

_FACTORS = "Tensor[] A, Tensor[] B, Tensor[] lora_bias, Tensor scale, Tensor? gates, int[] ranks, int[] layouts"
_ARGS = f"Tensor token, {_FACTORS}, {_lora.PLAN}, int padding"


def _launchers(stem, dtype_of, A, backend):
    return _lora.launchers(stem, dtype_of, A[0], backend)


def _kernel(weight, token, A, B, bias, scale, gates, ranks, layouts, ids, offsets, perm, tiles, step, padding, main_grad, backend):
    if token.device.type == "cpu" and token.numel() and not 0 <= int(token.min()) <= int(token.max()) < len(weight):
        raise IndexError(f"lora_embedding: ids range from {int(token.min())} to {int(token.max())}; the table has rows 0..{len(weight) - 1}")
    views_a, groups = _lora.factors_A(A, ranks, layouts), (offsets, perm, tiles)
    y = F.embedding(token, weight)
    s = y.new_empty(perm.shape[0], max(ranks), dtype=_lora.s_dtype(weight, A))
    _launchers("lora_embedding", weight, A, backend).lora_embedding_fwd(token, views_a, ids, *groups, s)
    _launchers("lora_expand", weight, A, backend).lora_expand_fwd(s, _lora.factors_B(B, ranks, layouts), bias, [scale], gates, *groups, [y])
    return y, s


def _bwd_kernel(dy, s, token, A, B, bias, scale, gates, ranks, layouts, ids, offsets, perm, tiles, step, padding, need, need_gates, need_scale, fp32_grads, backend):
    nA, nB, groups = len(A), len(B), (offsets, perm, tiles)
    dtype = _lora.grad_dtype(fp32_grads, A)
    grads_A, dA = _lora.new_grads(A, views_A, need[:nA], ranks, layouts, dtype)
    grads_B, dB = _lora.new_grads(B, views_B, need[nA : nA + nB], ranks, layouts, dtype)
    dbias = _lora.new_bias_grads(bias, need[nA + nB :], dtype)
    ds, e = torch.empty_like(s), _lora.new_e(dy, [scale], perm, need_gates or need_scale)
    factors = _lora.factors_B(B, ranks, layouts), bias, [scale], gates
    _launchers("lora_expand", dy, A, backend).lora_expand_bwd([dy], s, *factors, *groups, ds, e, dB, dbias)
    if any(need[:nA]):
        _launchers("lora_embedding", dy, A, backend).lora_embedding_bwd(ds, token, padding, ids, *groups, dA)
    dgates, (dscale,) = _lora.gate_and_scale_grads(e, [scale], gates, ids, *groups, need_gates, need_scale, backend)
    return dgates, dscale, [*grads_A, *grads_B, *dbias]


def _fake(weight, token, A, B, bias, scale, gates, ranks, layouts, ids, offsets, perm, *_):
    s = weight.new_empty(perm.shape[0], max(ranks), dtype=_lora.s_dtype(weight, A))
    return weight.new_empty(token.shape[0], weight.shape[1]), s


def _bwd_fake(dy, s, token, A, B, bias, scale, gates, ranks, layouts, ids, offsets, perm, tiles, step, padding, need, need_gates, need_scale, fp32_grads, backend):
    grads = _lora.fake_grads((*A, *B, *bias), need, fp32_grads)
    return scale.new_empty(perm.shape if need_gates else 0), scale.new_empty(scale.shape if need_scale else 0), grads


class _LoraEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, weight, *flat):
        args = unpack(spec, flat)
        with below_autograd():
            y, s = _op(weight, *args)
        *kept, ctx.main_grad, ctx.backend = args
        ctx.spec, ctx.n_tokens = spec, len(weight)
        save(ctx, s, *kept)
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        need_weight, *needs = ctx.needs_input_grad[1:]
        _, need_A, need_B, need_bias, need_scale, need_gates, *_ = unpack(ctx.spec, needs)
        s, token, *args = load(ctx)
        padding, dy = args[-1], dy.contiguous()
        need = [*need_A, *need_B, *(need_bias or [])]
        dweight = torch.ops.aten.embedding_dense_backward(dy, token, ctx.n_tokens, padding, False) if need_weight else None
        grads, small = [None] * len(need), (None, None)
        if any((*need, need_scale, need_gates)):
            dgates, dscale, grads = _bwd_op(dy, s, token, *args, need, need_gates, need_scale, bool(ctx.main_grad), ctx.backend)
            grads = _lora.returned(ctx.main_grad, grads, need)
            small = dscale if need_scale else None, dgates if need_gates else None
        n = len(need_A) + len(need_B)
        found = [None, dweight, None, *grads[:n], *(grads[n:] if need_bias else [None]), *small]
        return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def _apply(weight, *args):
    flat, spec = pack(args)
    return _LoraEmbedding.apply(spec, weight, *flat)


_op = register(
    "lora_embedding",
    f"lora_embedding(Tensor weight, {_ARGS}, {_lora.MAIN_GRAD}, str backend) -> (Tensor y, Tensor s)",
    kernel=_kernel,
    fake=_fake,
    autograd=_apply,
)
_bwd_op = register(
    "lora_embedding",
    f"lora_embedding_bwd(Tensor dy, Tensor s, {_ARGS}, bool[] need, bool need_gates, bool need_scale, bool fp32_grads, str backend)"
    " -> (Tensor dgates, Tensor dscale, Tensor[] grads)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)


def lora_embedding(ids, weight, bank, plan, *, padding_idx=None, gates=None, backend=None):
    """y [..., O] = F.embedding(ids, weight), plus each token's own adapters; PEFT's Embedding.

    ids: [...] int32 or int64 with T tokens in all. weight: [V, O], float32/bfloat16/float16 (float64 on the reference).
    bank: LoraBank from V to O, A_i [R_i, V]; its dropout is not used (PEFT has none on embeddings). plan: GroupPlan of
    ids [T], or [T, K] for several adapters a token, over len(bank) adapters; -1 = base only.
    padding_idx: as in F.embedding: read like any token, but its row of weight and its columns of every A get no gradient.
    gates: float of the plan's shape, multiplies each adapter's part; differentiable; None = 1.
    The result has the dtype of weight, with or without autocast. A layer that scales its output (embed_scale) scales this one.
    Raises IndexError for ids outside [0, V) on CPU; on a GPU the embedding of torch asserts, and our kernels stay inside
    their memory: such a token has no adapter. Raises TypeError/ValueError naming what else does not fit.
    """
    op = "lora_embedding"
    _lora.check_bank(op, bank)
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"{op}: ids is {got}; give an int32 or int64 tensor of tokens")
    if type(weight).__name__ == "DTensor":
        raise TypeError(f"{op}: weight is a DTensor; shard by decoder layer so that it is a plain tensor in forward")
    if weight.shape != (bank.in_features, bank.out_features):
        raise ValueError(f"{op}: weight is {tuple(weight.shape)}, the bank maps {bank.in_features} tokens -> {bank.out_features}; weight is [V, O]")
    for name, t in (("weight", weight), ("ids", ids)):
        if t.device != bank.device:
            raise ValueError(f"{op}: {name} is on {t.device}, the bank on {bank.device}; move them to one device")
    n_tokens = weight.shape[0]
    if padding_idx is not None and not -n_tokens <= padding_idx < n_tokens:
        raise ValueError(f"{op}: padding_idx is {padding_idx}; the table has rows 0..{n_tokens - 1}")
    padding = -1 if padding_idx is None else padding_idx % n_tokens
    token = ids.reshape(-1)
    check_plan(op, plan, len(bank), token.shape[0], token.device, "adapters in the bank", slots=True)
    A, B, bias, (scale,), _, _, ranks, layouts = _lora.bank_args(op, [bank])
    gates = _lora.flat_gates(op, gates, plan, scale)
    factors = A, B, bias, scale, gates, ranks, layouts
    y, _ = _op(weight, token, *factors, *_lora.plan_args(plan), padding, _lora.main_grads([bank], "A", "B", "bias"), _backends.requested(backend))
    return y.view(*ids.shape, y.shape[1])
