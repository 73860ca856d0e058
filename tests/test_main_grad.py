"""Gradients accumulated into float32 main_grad instead of .grad."""

import pytest
import torch

import mtkernels as mtk
from mtkernels.mid import act

RANKS, D, O = (4, 0, 7), 24, 16
IDS = [0, 2, -1, 2, 0, 2, 0]


def factors(dtype, way, frozen=()):
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(way.device, dtype)  # noqa: E731
    A, B, bias = ([make(*shape(r)).requires_grad_() for r in RANKS] for shape in (lambda r: (r, D), lambda r: (O, r), lambda r: (O,)))
    for i in frozen:
        A[i].requires_grad_(False)
    return A, B, bias


def bank_of(A, B, bias):
    return mtk.LoraBank.from_factors(A, B, 0.5, seeds=[1, 2, 3], dropout=0.25, bias=bias)


def run(bank, way, seed):
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(len(IDS), n, generator=generator).to(way.device, bank.dtype) for n in (D, O))
    plan = mtk.group_plan(torch.tensor(IDS, device=way.device), len(RANKS), step=seed, backend=way.backend)
    weight = torch.ones(O, D, device=way.device, dtype=bank.dtype)
    mtk.lora_linear(x, weight, None, bank, plan, backend=way.backend).backward(upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_backwards_add_up_in_float32(dtype, way):
    tensors = factors(dtype, way)
    bank, leaves = bank_of(*tensors), [t for ts in tensors for t in ts]
    for t in leaves:
        t.main_grad = torch.full(t.shape, 0.5, device=way.device)
    bank.main_grad = True
    wide = factors(torch.float32, way)
    for w, t in zip((t for ts in wide for t in ts), leaves):
        w.data.copy_(t.data)
    for seed in (1, 2):
        run(bank, way, seed)
    own = bank_of(*factors(dtype, way))
    plain = []
    for seed in (1, 2):
        run(own, way, seed)
        plain.append([t.grad.float() for t in (*own.A, *own.B, *own.bias)])
        for t in (*own.A, *own.B, *own.bias):
            t.grad = None
    tol = 1e-6 if dtype == torch.float32 else 1e-2
    for t, one, two in zip(leaves, *plain):
        assert t.grad is None
        torch.testing.assert_close(t.main_grad, 0.5 + one + two, rtol=tol, atol=tol * max([1.0, *one.abs().flatten().tolist()]))
    if dtype == torch.bfloat16:  # not rounded on the way: some sums have bits that bfloat16 cannot hold
        assert not torch.equal(leaves[0].main_grad, leaves[0].main_grad.bfloat16().float())


def calls(x, plan, backend):
    """{op: its result on a bank}, of rows x [T, D]; inputs that no gradient reaches are made of x."""
    on, gamma, gate = dict(backend=backend), x[0].detach(), x.detach().flip(1)
    wide = lambda bank: x.new_ones(len(x), max(bank.ranks))  # noqa: E731
    token = torch.arange(len(x), device=x.device) % D
    return {
        "lora_delta": lambda bank: mtk.lora_delta(x, bank, plan, **on),
        "lora_delta with mid": lambda bank: mtk.lora_delta(x, bank, plan, mid=act("silu"), **on),
        "lora_shrink": lambda bank: mtk.lora_shrink(x, bank, plan, **on),
        "lora_expand": lambda bank: mtk.lora_expand(wide(bank), bank, plan, **on),
        "lora_embedding": lambda bank: mtk.lora_embedding(token, x.new_ones(D, O), bank, plan, **on),
        "rmsnorm_lora_shrink": lambda bank: mtk.rmsnorm_lora_shrink(x, gamma, 1e-6, bank, plan, **on)[1],
        "swiglu_lora_shrink": lambda bank: mtk.swiglu_lora_shrink(gate, x, bank, plan, **on)[1],
    }


@pytest.mark.parametrize("op", calls(torch.zeros(1, D), None, None))
def test_every_op_adds_what_it_would_return(op, way):
    x = torch.randn(len(IDS), D, device=way.device)
    plan = mtk.group_plan(torch.tensor(IDS, device=way.device), len(RANKS), step=3, backend=way.backend)
    call, (A, B, bias) = calls(x, plan, way.backend)[op], factors(torch.float32, way)
    bank, leaves = bank_of(A, B, bias), [*A, *B, *bias]
    upstream = torch.randn_like(call(bank))
    reached = torch.autograd.grad(call(bank), leaves, upstream, allow_unused=True)
    assert any(g is not None and g.any() for g in reached)
    for t in leaves:
        t.main_grad = torch.full(t.shape, 0.5, device=way.device)
    bank.main_grad = True
    call(bank).backward(upstream)
    for t, g in zip(leaves, reached):
        assert t.grad is None
        assert torch.equal(t.main_grad, torch.full_like(t, 0.5) if g is None else 0.5 + g)


def test_frozen_parameters_need_no_main_grad(way):
    A, B, bias = factors(torch.float32, way, frozen=(0,))
    for t in (*A[1:], *B, *bias):
        t.main_grad = torch.zeros(t.shape, device=way.device)
    bank = bank_of(A, B, bias)
    bank.main_grad = True
    run(bank, way, 1)
    assert A[0].grad is None and B[0].main_grad.any() and A[2].main_grad.any()


def test_wrong_or_missing_main_grad_is_refused(way):
    A, B, bias = factors(torch.bfloat16, way)
    bank = bank_of(A, B, bias)
    bank.main_grad = True
    with pytest.raises(ValueError, match=r"main_grad of a parameter \(4, 24\) is NoneType; give it a float32"):
        run(bank, way, 1)
    for t in (*A, *B, *bias):
        t.main_grad = torch.zeros_like(t)
    with pytest.raises(ValueError, match="bfloat16"):
        run(bank, way, 1)
