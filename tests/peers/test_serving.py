"""vLLM's and SGLang's plain-torch LoRA (padded stacks, sorted segments, slices) against lora_shrink, lora_expand and groups."""

import pytest
import torch

import mtkernels as mtk

N, R, D, OUTS = 4, 8, 24, (16, 8, 8)
RANKS = (8, 3, 0, 5)


@pytest.fixture
def stacks():
    """Zero-padded slots, as serving engines keep them: A [n, R, D], one B [n, O, R] per slice."""
    A, Bs = torch.randn(N, R, D), [torch.randn(N, o, R) for o in OUTS]
    for i, r in enumerate(RANKS):
        A[i, r:] = 0
        for B in Bs:
            B[i, :, r:] = 0
    return A, Bs


def bank_of(A, B, scale=1.0):
    return mtk.LoraBank.from_stacked(A, B, scale, ranks=RANKS, seeds=[0] * N)


@pytest.mark.parametrize("ids", [[2, 0, -1, 1, 3, 0, 0, -1, 3], [-1] * 4, [1]], ids=str)
def test_vllm_bgmv(vllm_ops, stacks, ids, way):
    A, Bs = stacks
    ids, x, scaling = torch.tensor(ids), torch.randn(len(ids), D), 0.75
    plan, base = mtk.group_plan(ids, N, step=0, backend=way.backend), torch.randn(len(ids), OUTS[0])
    theirs = torch.empty(len(ids), R)
    vllm_ops.bgmv_shrink(x, A, theirs, ids, scaling)
    bank = bank_of(A, Bs[0])
    ours = mtk.lora_shrink(x, bank, plan, backend=way.backend)
    torch.testing.assert_close(scaling * ours, theirs)
    expected = base.clone()
    vllm_ops.bgmv_expand(theirs, Bs[0], expected, ids, add_inputs=True)
    torch.testing.assert_close(mtk.lora_expand(theirs, bank, plan, out=base, backend=way.backend), expected)


def test_vllm_sgmv_slices(vllm_ops, stacks, way):
    """Fused QKV: three slices of one output, segments of sorted rows."""
    A, Bs = stacks
    lengths, adapters = torch.tensor([3, 1, 4, 2]), torch.tensor([3, -1, 0, 1])
    ids, T = adapters.repeat_interleave(lengths), int(lengths.sum())
    x, s, y = torch.randn(T, D), torch.empty(T, R), torch.zeros(T, sum(OUTS))
    meta = (lengths.cumsum(0) - lengths, lengths, adapters, 4, 4, T)
    vllm_ops.sgmv_shrink(x, A, s, *meta, 1.0)
    for B, begin in zip(Bs, (0, OUTS[0], OUTS[0] + OUTS[1])):
        vllm_ops.sgmv_expand_slice(s, B, y, *meta, begin, B.shape[1], add_inputs=True)
    plan = mtk.group_plan(ids, N, step=0, backend=way.backend)
    ours = mtk.lora_delta_group(x, [bank_of(A, B) for B in Bs], plan, backend=way.backend)
    torch.testing.assert_close(torch.cat(ours, 1), y)


def test_sglang_sgemm_qkv(sglang_ops, stacks, way):
    """SGLang packs the live ranks of a layer's slices one after another and multiplies by a float32 scale per adapter."""
    _, Bs = stacks
    As = [torch.randn(N, R, D) for _ in OUTS]
    lengths, adapters, scale = torch.tensor([2, 5, 1, 3]), torch.tensor([1, 3, 0, 2]), torch.tensor([0.5, 2.0, 1.0, 0.25])
    ranks, offsets = torch.tensor(RANKS), torch.tensor([0, *torch.tensor(OUTS).cumsum(0).tolist()])
    x = torch.randn(int(lengths.sum()), D)
    packed_A, packed_B = torch.zeros(N, 3 * R, D), torch.cat(Bs, 1)
    for i, r in enumerate(RANKS):
        packed_A[i, : 3 * r] = torch.cat([A[i, :r] for A in As])
    s = sglang_ops.sgemm_lora_a_fwd(x, packed_A, adapters, lengths, ranks, scale, num_slices=3)
    y = sglang_ops.sgemm_lora_b_fwd(s, packed_B, adapters, lengths, ranks, offsets, base_output=torch.ones(len(x), sum(OUTS)))
    plan = mtk.group_plan(adapters.repeat_interleave(lengths), N, step=0, backend=way.backend)
    banks = [bank_of(A, B, scale) for A, B in zip(As, Bs)]
    ours = mtk.lora_delta_group(x, banks, plan, [torch.ones(len(x), o) for o in OUTS], backend=way.backend)
    torch.testing.assert_close(torch.cat(ours, 1), y, rtol=1e-4, atol=1e-4)
