"""LoRA forward kernels of serving engines: no backward, no dropout, adapters stacked at the largest rank."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import isolated
from .peers import takes_triton
from .registry import Call


class _Stacked:
    """The problem as these engines hold it: factors [adapter, rank, ...], rows sorted by adapter, ranks padded."""

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
