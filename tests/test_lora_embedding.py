import pytest
import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels import _backends

RANKS = (3, 0, 16, 1, 7, 40)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def launchers(way):
    return _backends.launchers("lora_embedding", torch.empty(0, device=way.device), way.backend)


def factors(layout, dtype, n_tokens, device, ranks=RANKS):
    """A of every layout a bank has: separate, one padded stack, rows far apart."""
    if layout == "stacked":
        stack = torch.randn(len(ranks), max(ranks), n_tokens, device=device).to(dtype)
        return [a[:r] for a, r in zip(stack, ranks)]
    wide = 2 * n_tokens if layout == "strided" else n_tokens
    return [torch.randn(r, wide, device=device).to(dtype)[:, :n_tokens] for r in ranks]


def plan_of(ids, way):
    plan = mtk.group_plan(ids.to(way.device), len(RANKS), step=0, backend=way.backend)
    return plan.ids, plan.offsets, plan.perm, plan.tiles


def sum_by_token(ds, token, padding, ids, ranks, n_tokens):
    """dA in float64, one adapter and one position at a time."""
    found = [torch.zeros(r, n_tokens, dtype=torch.float64) for r in ranks]
    n_slots = len(ds) // max(1, len(token))
    for p, i in enumerate(ids.reshape(-1).tolist()):
        v = int(token[p // n_slots])
        if i >= 0 and v != padding and 0 <= v < n_tokens:
            found[i][:, v] += ds[p, : ranks[i]].double().cpu()
    return found


BATCHES = {
    "ragged": torch.tensor([5, 0, 2, -1, 2, 4, 3, 0, 0, 5, 2, 2, 2, -1, 4, 0, 5]),
    "one fat adapter, one fat token": torch.tensor([2] * 700 + [0, -1, 5]),
    "two slots": torch.tensor([[0, 2], [2, 2], [-1, 5], [4, -1], [-1, -1], [3, 3], [5, 2]]),
    "no adapter": torch.tensor([-1] * 5),
    "one row": torch.tensor([5]),
    "empty": torch.tensor([], dtype=torch.int64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_launchers_against_loops(batch, dtype, way):
    """Gather and scatter alone, in every layout, with tokens out of range; the outputs hold NaN before."""
    ids, n_tokens = BATCHES[batch], 11
    token = torch.randint(0, n_tokens, ids.shape[:1])
    if len(token) > 100:
        token[:650] = 6  # a run of several chunks, beside short ones
    elif len(token) > 4:
        token[1], token[4] = -3, n_tokens
    groups = plan_of(ids, way)
    for layout, index in (("separate", torch.int64), ("stacked", torch.int32), ("strided", torch.int64)):
        A, given = factors(layout, dtype, n_tokens, way.device), token.to(way.device, index)
        s = torch.full((ids.numel(), max(RANKS) + 3), torch.nan, device=way.device, dtype=torch.float32 if layout == "strided" else dtype)
        launchers(way).lora_embedding_fwd(given, A, *groups, s)
        expected = torch.zeros(s.shape, dtype=s.dtype)
        for p, i in enumerate(ids.reshape(-1).tolist()):
            v = int(token[p // (ids.numel() // len(token))])
            if i >= 0 and 0 <= v < n_tokens:
                expected[p, : RANKS[i]] = A[i][:, v].to(s.dtype)
        assert same(s.cpu(), expected)

        ds = torch.randn(ids.numel(), max(RANKS), device=way.device).to(dtype)
        dA = [torch.full_like(a, torch.nan, memory_format=torch.preserve_format) for a in factors(layout, dtype, n_tokens, way.device)]
        dA[4] = dA[4].new_empty(0)
        launchers(way).lora_embedding_bwd(ds, given, 3, *groups, dA)
        for i, exact in enumerate(sum_by_token(ds, token, 3, ids, RANKS, n_tokens)):
            if i != 4:
                torch.testing.assert_close(dA[i].cpu(), exact.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-5 if dtype == torch.float32 else 2e-2)
                assert torch.equal(dA[i].cpu() == 0, exact.to(dtype) == 0)


def test_gradients_wider_than_ds(way):
    ids, token = BATCHES["ragged"], torch.arange(17) % 5
    ds = torch.randn(17, 40, device=way.device).bfloat16()
    dA = [torch.full((r, 5), torch.nan, device=way.device) for r in RANKS]
    launchers(way).lora_embedding_bwd(ds, token.to(way.device), -1, *plan_of(ids, way), dA)
    for ours, exact in zip(dA, sum_by_token(ds, token, -1, ids, RANKS, 5)):
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-5, atol=1e-5)


def test_a_run_has_the_same_bits_in_any_batch(kernel_way):
    """600 positions of one (adapter, token), alone and among others, starting at other offsets."""
    ds = torch.randn(600, 40, device=kernel_way.device)

    def column(ids, token, rows):
        padded = torch.randn(len(ids), 40, device=kernel_way.device)
        padded[rows] = ds
        dA = [torch.empty(r, 9, device=kernel_way.device) for r in RANKS]
        launchers(kernel_way).lora_embedding_bwd(padded, token.to(kernel_way.device), -1, *plan_of(ids, kernel_way), dA)
        return dA[5][:, 4]

    alone = column(torch.full((600,), 5), torch.full((600,), 4), slice(None))
    ids, token = torch.randint(-1, 6, (1100,)), torch.randint(0, 9, (1100,))
    rows = torch.randperm(1100)[:600].sort()[0]
    token[(ids == 5) & (token == 4)] = 3
    ids[rows], token[rows] = 5, 4
    assert torch.equal(column(ids, token, rows), alone)


def layer(peft, ranks=(4, 8, 2), n_tokens=30, width=12, padding_idx=None):
    base = torch.nn.Embedding(n_tokens, width, padding_idx=padding_idx)
    names = [f"a{i}" for i in range(len(ranks))]
    model = peft.get_peft_model(torch.nn.Sequential(base), peft.LoraConfig(r=ranks[0], lora_alpha=6, target_modules=["0"], lora_dropout=0.5), names[0])
    for name, r in zip(names[1:], ranks[1:]):
        model.add_adapter(name, peft.LoraConfig(r=r, lora_alpha=6, target_modules=["0"], lora_dropout=0.5))
    found = model.base_model.model[0]
    A, B = [found.lora_embedding_A[n] for n in names], [found.lora_embedding_B[n] for n in names]
    with torch.no_grad():
        for t in (*A, *B):
            t.requires_grad_().normal_()
    bank = mtk.LoraBank.from_factors(A, B, [found.scaling[n] for n in names], dropout=0.5)
    return model, found, names, bank


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_peft_layers_one_adapter_at_a_time(padding_idx):
    """In train mode: PEFT has no dropout on embeddings. `padding_idx` stops the gradient of A's column."""
    model, found, names, bank = layer(pytest.importorskip("peft"), padding_idx=padding_idx)
    weight = found.base_layer.weight.requires_grad_()
    tokens, ids = torch.randint(0, 30, (5, 6)), torch.tensor([0, 2, 1, 2, 0])
    tokens[:, 2] = 3
    plan = mtk.group_plan(ids.repeat_interleave(6), 3)
    with mtk.backend("reference"):
        ours = mtk.lora_embedding(tokens, weight, bank, plan, padding_idx=padding_idx)
    upstream, leaves = torch.randn_like(ours), [weight, *bank.params_A, *bank.params_B]
    grads = torch.autograd.grad(ours, leaves, upstream)
    expected, totals = torch.empty_like(ours), [torch.zeros_like(t) for t in leaves]
    model.train()
    for i, name in enumerate(names):
        model.set_adapter(name)
        for t in leaves:
            t.requires_grad_()
        out = model(tokens[ids == i])
        expected[ids == i] = out.detach()
        for total, g in zip(totals, torch.autograd.grad(out, leaves, upstream[ids == i], allow_unused=True)):
            total += 0 if g is None else g
    torch.testing.assert_close(ours, expected)
    for a, b in zip(grads, totals):
        torch.testing.assert_close(a, b)
    if padding_idx is not None:
        assert not grads[0][padding_idx].any() and not any(g[:, padding_idx].any() for g in grads[1:4])


def small(n_tokens=9, width=5, n=2):
    A, B = [torch.randn(3, n_tokens, requires_grad=True) for _ in range(n)], [torch.randn(width, 3, requires_grad=True) for _ in range(n)]
    return torch.randn(n_tokens, width), mtk.LoraBank.from_factors(A, B, 2.0)


def test_negative_padding_counts_from_the_end():
    weight, bank = small()
    token = torch.tensor([8, 1, 8])
    with mtk.backend("reference"):
        y = mtk.lora_embedding(token, weight.requires_grad_(), bank, mtk.group_plan(torch.tensor([0, 0, 1]), 2), padding_idx=-1)
    grads = torch.autograd.grad(y.sum(), [weight, *bank.params_A])
    plain = torch.autograd.grad(F.embedding(token, weight, -1).sum(), weight)[0]
    assert torch.equal(grads[0], plain) and not any(g[:, 8].any() for g in grads[1:]) and grads[1][:, 1].all()


def test_a_frozen_table_gets_no_gradient_and_only_wanted_factors_do():
    weight, bank = small()
    bank.params_A[0].requires_grad_(False)
    with mtk.backend("reference"):
        y = mtk.lora_embedding(torch.tensor([[1, 2]]), weight, bank, mtk.group_plan(torch.tensor([0, 1]), 2))
    y.sum().backward()
    assert weight.grad is None and bank.params_A[0].grad is None
    assert bank.params_A[1].grad[:, 2].all() and bank.params_B[0].grad is not None


def test_main_grad_is_added_to_in_float32():
    """16-bit factors; gradients in float32 that were never rounded, on top of what is there."""
    A, B = [torch.randn(3, 9).bfloat16().requires_grad_() for _ in range(2)], [torch.randn(5, 3).bfloat16().requires_grad_() for _ in range(2)]
    token, plan, weight = torch.tensor([1, 2, 1, 7]), mtk.group_plan(torch.tensor([0, 0, 0, 1]), 2), torch.randn(9, 5).bfloat16()
    bank, upstream = mtk.LoraBank.from_factors(A, B, 2.0), torch.randn(4, 5).bfloat16()
    wide = [t.detach().float().requires_grad_() for t in (*A, *B)]
    with mtk.backend("reference"):
        y = mtk.lora_embedding(token, weight.float(), mtk.LoraBank.from_factors(wide[:2], wide[2:], 2.0), plan)
        exact = torch.autograd.grad(y, wide, upstream.float())
        bank.main_grad = True
        before = [torch.randn(t.shape) for t in (*A, *B)]
        for t, grad in zip((*A, *B), before):
            t.main_grad = grad.clone()
        mtk.lora_embedding(token, weight, bank, plan).backward(upstream)
    for t, grad, g in zip((*A, *B), before, exact):
        assert t.grad is None
        torch.testing.assert_close(t.main_grad, grad + g, rtol=1e-2, atol=1e-2)


def test_errors():
    weight, bank = small()
    plan = mtk.group_plan(torch.tensor([0, 1]), 2)
    token = torch.tensor([0, 1])
    with mtk.backend("reference"), pytest.raises(IndexError, match=r"lora_embedding: ids range from 0 to 9; the table has rows 0\.\.8"):
        mtk.lora_embedding(torch.tensor([0, 9]), weight, bank, plan)
    with mtk.backend("reference"), pytest.raises(IndexError, match="ids range from -1 to 0"):
        mtk.lora_embedding(torch.tensor([0, -1]), weight, bank, plan)
    with pytest.raises(TypeError, match="ids is torch.float32; give an int32 or int64"):
        mtk.lora_embedding(token.float(), weight, bank, plan)
    with pytest.raises(ValueError, match=r"weight is \(5, 9\), the bank maps 9 tokens -> 5; weight is \[V, O\]"):
        mtk.lora_embedding(token, weight.T, bank, plan)
    with pytest.raises(ValueError, match=r"padding_idx is 9; the table has rows 0\.\.8"):
        mtk.lora_embedding(token, weight, bank, plan, padding_idx=9)
    with pytest.raises(ValueError, match="the plan covers 2 rows, but the input has 3"):
        mtk.lora_embedding(torch.tensor([0, 1, 2]), weight, bank, plan)
    with pytest.raises(TypeError, match="bank is a list"):
        mtk.lora_embedding(token, weight, [], plan)
    with pytest.raises(ValueError, match=r"gates is \(3,\)"):
        mtk.lora_embedding(token, weight, bank, plan, gates=torch.ones(3))
