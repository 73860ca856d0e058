"""Where a bank's factors may live: packed by rank, stacked over slots, PEFT's experts."""

import pytest
import torch

import mtkernels as mtk

D, O = 24, 20
IDS = [0, 1, 1, -1, 2, 0, 1, 2, 2, 0]
OPTIONS = dict(dropout=[0.25, 0.0, 0.5], seeds=[5, 6, 7])
SCALE = [0.5, 1.5, 2.0]


def run(bank, leaves, way):
    """(y, dx, gradients of the leaves) of one lora_linear over IDS."""
    generator = torch.Generator().manual_seed(1)
    x, weight, upstream = (torch.randn(*shape, generator=generator).to(way.device) for shape in ((len(IDS), D), (O, D), (len(IDS), O)))
    plan = mtk.group_plan(torch.tensor(IDS, device=way.device), len(bank), step=3, backend=way.backend)
    y = mtk.lora_linear(x.requires_grad_(), weight, None, bank, plan, backend=way.backend)
    dx, *grads = torch.autograd.grad(y, [x, *leaves], upstream)
    return y.detach(), dx, grads


def check(bank, A, B, split_A, split_B, way):
    """`bank` does what separate factors do; split_* turn its parameters' gradients into one per adapter."""
    separate = [t.to(way.device).contiguous().requires_grad_() for t in (*A, *B)]
    own = mtk.LoraBank.from_factors(separate[: len(A)], separate[len(A) :], SCALE, **OPTIONS)
    leaves = [t.requires_grad_() for t in (bank.params_A[0], bank.params_B[0])]
    assert bank.ranks == own.ranks and len(bank) == 3 and (bank.in_features, bank.out_features) == (D, O)
    y, dx, (dA, dB) = run(bank, leaves, way)
    expected_y, expected_dx, expected = run(own, separate, way)
    assert dA.shape == bank.params_A[0].shape and dB.shape == bank.params_B[0].shape
    for ours, theirs in zip((y, dx, *split_A(dA), *split_B(dB)), (expected_y, expected_dx, *expected)):
        assert torch.equal(ours, theirs) if way.backend == "cpu" else torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [(4, 0, 7), (1, 16, 3)])
def test_packed(ranks, way):
    A, B = torch.randn(sum(ranks), D), torch.randn(sum(ranks), O)
    bank = mtk.LoraBank.from_packed(A.to(way.device), B.to(way.device), ranks, SCALE, **OPTIONS)
    check(bank, A.split(ranks), [b.T for b in B.split(ranks)], lambda g: g.split(ranks), lambda g: [b.T for b in g.split(ranks)], way)


@pytest.mark.parametrize("ranks", [None, (4, 0, 7)])
def test_stacked(ranks, way):
    A, B = torch.randn(3, 7, D), torch.randn(3, O, 7)
    used = ranks or (7, 7, 7)
    bank = mtk.LoraBank.from_stacked(A.to(way.device), B.to(way.device), SCALE, ranks=ranks, **OPTIONS)
    split_A, split_B = lambda g: [a[:r] for a, r in zip(g, used)], lambda g: [b[:, :r] for b, r in zip(g, used)]
    check(bank, split_A(A), split_B(B), split_A, split_B, way)


def test_what_a_slot_does_not_use_is_not_read_and_gets_exact_zeros(way):
    A, B, ranks = torch.randn(3, 7, D), torch.randn(3, O, 7), (4, 0, 7)
    for i, r in enumerate(ranks):
        A[i, r:], B[i, :, r:] = torch.nan, torch.nan
    bank = mtk.LoraBank.from_stacked(A.to(way.device), B.to(way.device), SCALE, ranks=ranks, **OPTIONS)
    y, dx, (dA, dB) = run(bank, [t.requires_grad_() for t in (bank.params_A[0], bank.params_B[0])], way)
    assert all(torch.isfinite(t).all() for t in (y, dx, dA, dB))
    for i, r in enumerate(ranks):
        assert not dA[i, r:].any() and not dB[i, :, r:].any()


def test_experts(way):
    """A has the expert slowest, B has it fastest."""
    rank, A, B = 5, torch.randn(3 * 5, D), torch.randn(O, 5 * 3)
    bank = mtk.LoraBank.from_experts(A.to(way.device), B.to(way.device), 3, SCALE, **OPTIONS)
    factor_B = [torch.stack([B[:, r * 3 + e] for r in range(rank)], 1) for e in range(3)]
    check(bank, A.split(rank), factor_B, lambda g: g.split(rank), lambda g: g.view(O, rank, 3).unbind(2), way)


def test_nothing_is_copied():
    A, B = torch.randn(11, D), torch.randn(11, O)
    bank = mtk.LoraBank.from_packed(A, B, (4, 7), 1.0)
    assert bank.params_A[0] is A and all(t.untyped_storage().data_ptr() == A.untyped_storage().data_ptr() for t in bank.A)
    A.zero_()
    assert not bank.A[1].any()


def test_bad_storage_is_named():
    A, B = torch.randn(11, D), torch.randn(11, O)
    A3, B3 = torch.randn(3, 7, D), torch.randn(3, O, 7)
    cases = [
        (r"packed A \(11, 24\) and B \(11, 20\) for ranks \[4, 6\]; give \[10, D\] and \[10, O\]", lambda: mtk.LoraBank.from_packed(A, B, (4, 6), 1.0)),
        (r"ranks \[12, -1\]", lambda: mtk.LoraBank.from_packed(A, B, (12, -1), 1.0)),
        (r"ranks \[\]", lambda: mtk.LoraBank.from_packed(A[:0], B[:0], (), 1.0)),
        (r"packed A \(11, 24\) and B \(20, 11\)", lambda: mtk.LoraBank.from_packed(A, B.T, (4, 7), 1.0)),
        (r"stacked A \(11, 24\) and B \(3, 20, 7\); give \[n, R, D\] and \[n, O, R\]", lambda: mtk.LoraBank.from_stacked(A, B3, 1.0)),
        (r"stacked A \(3, 7, 24\) and B \(3, 7, 20\)", lambda: mtk.LoraBank.from_stacked(A3, B3.mT, 1.0)),
        (r"ranks \[4, 8, 7\] for 3 slots of 7; give one in \[0, 7\] per slot", lambda: mtk.LoraBank.from_stacked(A3, B3, 1.0, ranks=(4, 8, 7))),
        (r"ranks \[4, 7\] for 3 slots", lambda: mtk.LoraBank.from_stacked(A3, B3, 1.0, ranks=(4, 7))),
        (r"expert A \(11, 24\) and B \(20, 11\) for 3 experts; give \[3 R, D\] and \[O, R 3\]", lambda: mtk.LoraBank.from_experts(A, B.T, 3, 1.0)),
        (r"for 0 experts", lambda: mtk.LoraBank.from_experts(A, B.T, 0, 1.0)),
        (r"A\[0\] is torch.int64", lambda: mtk.LoraBank.from_packed(A.long(), B, (4, 7), 1.0)),
        ("adapter 0 is torch.float32/torch.float16", lambda: mtk.LoraBank.from_packed(A, B.half(), (4, 7), 1.0)),
        (r"scale has shape \(3,\)", lambda: mtk.LoraBank.from_packed(A, B, (4, 7), [1.0, 2.0, 3.0])),
        ("3 seeds for 2 adapters|.3,. seeds for 2 adapters", lambda: mtk.LoraBank.from_packed(A, B, (4, 7), 1.0, seeds=[1, 2, 3])),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
