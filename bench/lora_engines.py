"""LoRA kernels of other projects, loaded file by file: the forward of two serving engines, and LoRAFusion's training kernels."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.overrides import TorchFunctionMode

from mtkernels import _backends

from . import isolated
from .peers import takes_triton
from .registry import Call, Unavailable


class _Stacked:
    """The problem as serving engines hold it, without backward and dropout: factors [adapter, rank, ...], rows sorted by adapter, ranks padded."""

    def __init__(self, problem, A, B, plan):
        ranks = [a.shape[0] for a in A]
        self.x, self.plan, self.n, self.widest = problem.leaves["x"], plan, len(A), max(ranks)
        self.ranks = torch.tensor(ranks, dtype=torch.int32, device=self.x.device)
        self.A = torch.stack([F.pad(a.detach(), (0, 0, 0, self.widest - r)) for a, r in zip(A, ranks)])
        self.B = torch.stack([F.pad(b.detach(), (0, self.widest - r)) for b, r in zip(B, ranks)])
        self.adapters = torch.arange(self.n, dtype=torch.int32, device=self.x.device)

    def call(self, problem, fn):
        return Call(fn, {}, problem.upstream, (self.A, self.B, *self.plan.tensors()))


def sglang(problem, base, A, B, scale, plan):
    """sgemm_lora_a and sgemm_lora_b of its Triton backend: segments of sorted rows, each adapter at its own rank."""
    takes_triton(problem.leaves["x"].device.type)
    folder = "kernels.ops.lora.dense"
    _, shrink, expand = isolated.load("sglang", [f"{folder}.{m}" for m in ("kernel_utils", "sgemm_lora_a", "sgemm_lora_b")])
    stacked = _Stacked(problem, A, B, plan)
    batch = SimpleNamespace(
        bs=stacked.n,
        max_len=int(plan.counts.max()),
        seg_lens=plan.counts,
        seg_indptr=plan.offsets,
        weight_indices=stacked.adapters,
        lora_ranks=stacked.ranks,
        scalings=torch.full((stacked.n,), scale, device=plan.device),
        permutation=plan.perm,
    )

    def fn():
        y = base()
        return expand.sgemm_lora_b_fwd(shrink.sgemm_lora_a_fwd(stacked.x.detach(), stacked.A, batch), stacked.B, batch, y)

    return stacked.call(problem, fn)


def _refuse_registration(*args, **kwargs):
    raise AttributeError("the plain function is wanted")


_VLLM = {
    "vllm": {"envs": SimpleNamespace(VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None, VLLM_LORA_ENABLE_DUAL_STREAM=False)},
    "vllm.platforms": {"current_platform": SimpleNamespace(is_cuda=lambda: False)},
    "vllm.triton_utils": {"tl": tl, "triton": triton},
    "vllm.utils.torch_utils": {"direct_register_custom_op": _refuse_registration},
}


def _whole_stack(weights, offset, device):
    """vLLM passes the first adapter's matrix for the stack behind it; the same pointer with the extent of all."""
    (b,) = weights
    return offset, b, *b.stride(), b.shape[1], True, b.shape[1]


def vllm(problem, base, A, B, scale, plan):
    """lora_shrink and lora_expand with default tiles: shrink splits K with atomics into float32, every adapter at the largest rank."""
    takes_triton(problem.leaves["x"].device.type)
    folder = "lora.ops.triton_ops"
    *_, shrink, expand = isolated.load("vllm", [f"{folder}.{m}" for m in ("utils", "kernel_utils", "lora_shrink_op", "lora_expand_op")], _VLLM)
    expand._get_lora_b_ptr = _whole_stack
    stacked = _Stacked(problem, A, B, plan)
    # its scale is folded into B; one more slot stands for rows without adapter
    scaled, none, active = stacked.B * scale, torch.zeros(1, dtype=torch.bool), torch.tensor([stacked.n], dtype=torch.int32)
    ids, counts, starts = (F.pad(t, (0, 1), value=v) for t, v in ((stacked.adapters, -1), (plan.counts, 0), (plan.offsets, 0)))
    meta = plan.ids, plan.perm, counts, starts, ids, none, active

    def fn():
        y = base()
        s = torch.empty(1, len(y), stacked.widest, device=y.device)
        shrink.lora_shrink(stacked.x.detach(), [stacked.A], s, *meta, 1.0)
        expand.lora_expand(s, [scaled], y, *meta, add_inputs=True)
        return y

    return stacked.call(problem, fn)


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _FusedMultiLora(torch.autograd.Function):
    """Its own Function takes four adapters; the functions below that one take any number."""

    @staticmethod
    def forward(ctx, module, batch, x, weight, *factors):
        A, B = list(factors[: len(factors) // 2]), list(factors[len(factors) // 2 :])
        with _CudaIsCpu():
            y, mask, dropped, s, *pointers = module._fused_linear_multi_lora_forward(
                x, weight, lora_a_list=A, lora_b_list=B, same_dropout_p_value=batch.same_dropout_p_value, seed=7, **_common(batch)
            )
        ctx.module, ctx.batch, ctx.saved = module, batch, (weight, A, B, mask, dropped, s, pointers)
        return y

    @staticmethod
    def backward(ctx, dy):
        weight, A, B, mask, dropped, s, (s_pointers, b_pointers) = ctx.saved
        factors = dict(s_ptrs_list=s_pointers, b_ptrs_list=b_pointers, lora_a_list=A, lora_b_list=B, s_list=s)
        with _CudaIsCpu():
            dx, da, db, _ = ctx.module._fused_linear_multi_lora_backward(
                dy, weight, masked_scaled_x=dropped, dropout_mask=mask, **factors, **_common(ctx.batch)
            )
        return None, None, dx, None, *da, *db


def _common(batch):
    names = ("seq_len_list", "padded_seq_len_list", "block_to_lookup_table", "block_to_dropout_p", "block_to_alpha", "enable_dropout", "max_r")
    return {name: getattr(batch, name) for name in names}


_LORAFUSION = ("ops.triton_ops.utils", "ops.triton_ops.config", "ops.triton_ops.blocked_dropout", "ops.triton_ops.dropout") + tuple(
    f"ops.triton_ops.fused_multi_lora_{name}" for name in ("xw_sb", "dys_dyb", "dyw_dsa")
)


def lorafusion(problem, A, B, scale, plan):
    """Its fused multi-adapter linear with H100 tiles, on rows already sorted by adapter and padded to its blocks of 128.

    It needs its own batches, so it is counted and not timed. It fuses the frozen layer's product into its kernels.
    """
    if not _backends.emulating():
        raise Unavailable("counted by `python -m mtkernels.lab cost`, not timed: it takes rows sorted and padded to 128 an adapter")
    names = {"lorafusion.utils.common": {"get_device_short_name": lambda: "h100-80gb-hbm3"}}
    *_, module = isolated.load("lorafusion", [*_LORAFUSION, "ops.multi_lora"], names, others=("loguru", "megatron"))
    n, x, counts = len(A), problem.leaves["x"], plan.counts.tolist()
    if not all(counts):
        raise Unavailable("takes no adapter without rows")
    p = problem.case.shape["p"] if problem.training else 0.0
    with _CudaIsCpu():
        ranks = [a.shape[0] for a in A]
        batch = module.prepare_multi_lora_batch_info(counts, list(range(n)), ranks, [p] * n, [scale] * n, 128, x.dtype)
    starts = [sum(batch.padded_seq_len_list[:i]) for i in range(n)]
    rows = torch.cat([start + torch.arange(count) for start, count in zip(starts, counts)])
    sorted_x, upstream = (t.detach().new_zeros(sum(batch.padded_seq_len_list), t.shape[1]) for t in (x, problem.upstream))
    sorted_x[rows], upstream[rows] = x.detach()[plan.perm], problem.upstream[plan.perm]
    leaves = {"x sorted": sorted_x.requires_grad_()}
    leaves |= {f"A{i}": a for i, a in enumerate(A)} | {f"B{i}": b for i, b in enumerate(B)}
    return Call(lambda: _FusedMultiLora.apply(module, batch, sorted_x, problem.fixed["weight"], *A, *B), leaves, upstream)
