"""Edges and errors of rmsnorm_lora_shrink, against transformers' norms and PEFT's layers."""

import pytest
import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels.testing import plain_rmsnorm
from mtkernels.testing.producers import plain_s

EPS = 1e-5


def bank_of(ranks, n_in, way, n_out=8, dtype=torch.float32, **options):
    A = [torch.randn(r, n_in, device=way.device).to(dtype).requires_grad_() for r in ranks]
    B = [torch.randn(n_out, r, device=way.device).to(dtype).requires_grad_() for r in ranks]
    return mtk.LoraBank.from_factors(A, B, [0.5 + i for i in range(len(ranks))], **{"seeds": list(range(len(ranks))), **options})


def rows(way, *shape, dtype=torch.float32):
    return torch.randn(*shape, device=way.device).to(dtype).requires_grad_()


def assert_same_gradients(ours, plain, leaves, rtol=2e-4):
    """Both outputs and the gradients of the leaves, from random gradients of both outputs."""
    upstream = [torch.randn_like(t) for t in ours]
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.detach().abs().max()) if b.numel() else 0)
    for a, b in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(plain, leaves, upstream, allow_unused=True)):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max([1e-3, *b.abs().flatten().tolist()]))


def compare(x, gamma, banks, ids, way, **options):
    plan, sites = mtk.group_plan(ids, len(banks[0]), step=11, backend=way.backend), range(4, 4 + len(banks))
    ours = mtk.rmsnorm_lora_shrink(x, gamma, EPS, banks, plan, sites=sites, backend=way.backend, **options)
    plain = plain_rmsnorm(x, gamma, EPS, **options)
    leaves = [x, gamma, *(a for bank in banks for a in bank.params_A if a.numel())]
    assert_same_gradients(ours, (plain, plain_s(plain, banks, ids, sites)), leaves)


SHAPES = {
    "ranks 0 1 3 7 16 33": ([0, 1, 3, 7, 16, 33], 40, [0, 1, 2, 3, 4, 5, 5, -1, 2, 1]),
    "rank 200, odd width": ([200, 2], 37, [0, 1, 0, -1, 0]),
    "rank wider than the row": ([70], 10, [0, 0, 0]),
    "one column": ([2, 1], 1, [0, 1, 1]),
    "one fat adapter": ([5, 8, 3], 33, [1] * 150 + [0, 2]),
    "single row": ([4], 24, [0]),
    "adapters without rows": ([4, 4, 4], 130, [1, 1]),
    "rank 0 alone": ([0, 0], 24, [1, 0, -1]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_targets", [1, 2, 4])
def test_shapes(shape, n_targets, way):
    ranks, n_in, ids = SHAPES[shape]
    banks = [bank_of(ranks[g % 2 :] + ranks[: g % 2], n_in, way, dropout=0.3 * (g % 2)) for g in range(n_targets)]
    compare(rows(way, len(ids), n_in), rows(way, n_in), banks, torch.tensor(ids, device=way.device), way)


def test_several_chunks(way):
    """More rows of one adapter, and of none, than one partial sum takes."""
    n = 1100 if way.name == "interpret" else 2500
    ids = torch.tensor([1] * n + [0] * 3 + [-1] * 300, device=way.device)[torch.randperm(n + 303)]
    compare(rows(way, len(ids), 12), rows(way, 12), [bank_of([3, 5], 12, way, dropout=0.5)], ids, way)


def test_rows_of_several_adapters(way):
    ids = torch.tensor([[0, 1, -1], [3, 3, 2], [-1, -1, -1], [-1, 2, 0], [1, 0, 3]], device=way.device)
    banks = [bank_of([4, 9, 0, 17], 40, way, dropout=[0.5, 0.0, 0.2, 0.1]), bank_of([2, 2, 40, 1], 40, way)]
    compare(rows(way, 5, 40), rows(way, 40), banks, ids, way, offset=1.0, casting="gemma")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_rounds_as_transformers(family, dtype, way):
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    norm = (modeling.LlamaRMSNorm if family == "llama" else modeling.GemmaRMSNorm)(96, eps=EPS).to(way.device, dtype)
    norm.weight.data = torch.randn(96, device=way.device).to(dtype)
    x = 3 * rows(way, 50, 96, dtype=dtype)
    plan = mtk.group_plan(torch.zeros(50, dtype=torch.int64, device=way.device), 1, backend=way.backend)
    offset = 1.0 if family == "gemma" else 0.0
    xn, _ = mtk.rmsnorm_lora_shrink(x, norm.weight, EPS, bank_of([2], 96, way, dtype=dtype), plan, offset=offset, backend=way.backend)
    if way.name == "reference":
        assert torch.equal(xn, norm(x))
    else:  # another order of the sum of squares moves a few results by one rounding
        assert (xn != norm(x)).float().mean() < 0.01
        torch.testing.assert_close(xn, norm(x), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_float32_gamma_beside_bfloat16_rows(way):
    x, gamma = rows(way, 6, 40, dtype=torch.bfloat16), rows(way, 40)
    bank = bank_of([3, 4], 40, way)  # float32 factors
    plan = mtk.group_plan(torch.tensor([0, 1, 1, -1, 0, 1], device=way.device), 2, backend=way.backend)
    xn, s = mtk.rmsnorm_lora_shrink(x, gamma, EPS, bank, plan, backend=way.backend)
    assert xn.dtype == torch.bfloat16 and s.dtype == torch.float32
    torch.testing.assert_close(s, mtk.lora_shrink(xn, bank, plan, backend=way.backend), rtol=1e-5, atol=1e-5)
    dx, dgamma = torch.autograd.grad((xn, s), (x, gamma), (torch.ones_like(xn), torch.ones_like(s)))
    assert dx.dtype == torch.bfloat16 and dgamma.dtype == torch.float32


def test_strided_rows_and_a_stacked_bank(way):
    wide = torch.randn(7, 64, device=way.device)
    A, B = torch.randn(3, 6, 40, device=way.device, requires_grad=True), torch.randn(3, 8, 6, device=way.device)
    bank = mtk.LoraBank.from_stacked(A, B, 1.0, ranks=[6, 2, 0], dropout=0.4, seeds=[1, 2, 3])
    ids, gamma = torch.tensor([0, 1, 2, -1, 0, 1, 0], device=way.device), rows(way, 40)
    plan = mtk.group_plan(ids, 3, step=1, backend=way.backend)
    x = wide[:, 8:48].requires_grad_()
    ours = mtk.rmsnorm_lora_shrink(x, gamma, EPS, bank, plan, backend=way.backend)
    plain = plain_rmsnorm(x, gamma, EPS)
    plain = plain, plain_s(plain, [bank], ids, [0], step=1)
    assert_same_gradients(ours, plain, [x, gamma, A])
    dxn, ds = torch.randn(7, 80, device=way.device)[:, ::2], torch.randn(6, 7, device=way.device).T
    ours = mtk.rmsnorm_lora_shrink(x, gamma, EPS, bank, plan, backend=way.backend)
    strided = torch.autograd.grad(ours, [x, gamma, A], (dxn, ds), retain_graph=True)
    dense = torch.autograd.grad(ours, [x, gamma, A], (dxn.contiguous(), ds.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(strided, dense))


@pytest.mark.parametrize("wanted", ["x", "gamma", "A", "one output"])
def test_frozen_parts(wanted, way):
    x, gamma, bank = rows(way, 9, 40), rows(way, 40), bank_of([3, 20], 40, way, dropout=0.25)
    ids = torch.tensor([0, 1, 1, -1, 0, 1, 0, 0, 1], device=way.device)
    plan = mtk.group_plan(ids, 2, step=3, backend=way.backend)
    leaves = dict(x=[x], gamma=[gamma], A=[bank.A[1]]).get(wanted, [x, gamma, *bank.A])

    def gradients(frozen):
        for t in (x, gamma, *bank.A):
            t.requires_grad_(not frozen or any(t is leaf for leaf in leaves))
        xn, s = mtk.rmsnorm_lora_shrink(x, gamma, EPS, bank, plan, backend=way.backend)
        out = s.square().sum() if wanted == "one output" else xn.sin().sum() + s.square().sum()
        return torch.autograd.grad(out, leaves)

    for a, b in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)  # another kernel, whose products may be contracted otherwise


def test_gradients_right_of_a_rank_are_not_read(way):
    x, gamma, bank = rows(way, 4, 24), rows(way, 24), bank_of([2, 20], 24, way)
    plan = mtk.group_plan(torch.tensor([0, 1, -1, 0], device=way.device), 2, backend=way.backend)
    out = mtk.rmsnorm_lora_shrink(x, gamma, EPS, bank, plan, backend=way.backend)
    clean = [torch.randn_like(t) for t in out]
    poisoned = [clean[0], clean[1].clone()]
    poisoned[1][[0, 3], 2:] = poisoned[1][2] = torch.nan
    leaves = [x, gamma, *bank.A]
    for a, b in zip(torch.autograd.grad(out, leaves, clean, retain_graph=True), torch.autograd.grad(out, leaves, poisoned)):
        assert torch.equal(a, b)


def test_saves_x_and_rank_space_only(way):
    x, gamma, bank = rows(way, 9, 40), rows(way, 40), bank_of([3, 2], 40, way, dropout=0.25)
    weight = torch.randn(8, 40, device=way.device)
    plan, kept = mtk.group_plan(torch.tensor([0, 1, 1, -1, 0, 1, 0, 0, 1], device=way.device), 2, backend=way.backend), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        xn, s = mtk.rmsnorm_lora_shrink(x, gamma, EPS, [bank, bank], plan, backend=way.backend)
        parts = s.split([3, 3], -1)
        y = mtk.lora_expand(parts[1], bank, plan, F.linear(xn, weight), backend=way.backend)
    assert not any(t.data_ptr() == xn.data_ptr() for t in kept)
    known = {t.untyped_storage().data_ptr() for t in (x, gamma, weight, s, *plan.tensors(), *bank.tensors())}
    new = [t for t in kept if t.untyped_storage().data_ptr() not in known]
    assert [tuple(t.shape) for t in new] == [(9,)]  # 1 / rms; lora_expand keeps its slice of s, not a copy
    y.sum().backward()


def test_slices_feed_lora_expand(way):
    """Base layers and adapters of three targets, as users compose them, equal lora_linear_group on the normalised rows."""
    x, gamma = rows(way, 2, 5, 40), rows(way, 40)
    banks = [bank_of(r, 40, way, n_out=o, dropout=p) for r, o, p in (([3, 7], 16, 0.5), ([2, 0], 8, 0.0), ([1, 20], 24, 0.1))]
    weights = [torch.randn(bank.out_features, 40, device=way.device) for bank in banks]
    plan = mtk.group_plan(torch.tensor([0, 1, 1, -1, 0, 1, 0, 0, -1, 1], device=way.device), 2, step=5, backend=way.backend)
    xn, s = mtk.rmsnorm_lora_shrink(x, gamma, EPS, banks, plan, backend=way.backend)
    parts = s.split([max(bank.ranks) for bank in banks], -1)
    ours = [mtk.lora_expand(s_g, bank, plan, F.linear(xn, w), backend=way.backend) for s_g, bank, w in zip(parts, banks, weights)]
    plain = mtk.lora_linear_group(plain_rmsnorm(x, gamma, EPS), weights, None, banks, plan, backend=way.backend)
    assert_same_gradients(ours, plain, [x, gamma, *(t for bank in banks for t in (*bank.A, *bank.B) if t.numel())])


def test_errors(way):
    x, gamma, bank = torch.randn(3, 8, device=way.device), torch.ones(8, device=way.device), bank_of([2], 8, way)
    plan = mtk.group_plan(torch.tensor([0, 0, -1], device=way.device), 1, backend=way.backend)
    call = mtk.rmsnorm_lora_shrink
    with pytest.raises(ValueError, match=r"gamma is \(7,\); x takes \(8,\)"):
        call(x, gamma[:7], EPS, bank, plan)
    with pytest.raises(TypeError, match="gamma is torch.float64, x is torch.float32"):
        call(x, gamma.double(), EPS, bank, plan)
    with pytest.raises(ValueError, match="1 banks and 2 sites"):
        call(x, gamma, EPS, [bank], plan, sites=[0, 1])
    with pytest.raises(ValueError, match="casting is 'liger'; give 'llama' or 'gemma'"):
        call(x, gamma, EPS, bank, plan, casting="liger")
    with pytest.raises(ValueError, match="the bank takes 8 features"):
        call(x[:, :4], gamma[:4], EPS, bank, plan)
    with pytest.raises(TypeError, match=r"bank\[1\] is torch.bfloat16, bank\[0\] is torch.float32"):
        call(x, gamma, EPS, [bank, bank_of([2], 8, way, dtype=torch.bfloat16)], plan)
