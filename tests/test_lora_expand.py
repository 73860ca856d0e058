"""Edges and errors of lora_expand."""

import pytest
import torch

import mtkernels as mtk
from mtkernels import _backends, _native
from mtkernels.testing import poisoned

O, RANKS = 40, (3, 0, 16, 1, 33)
WIDEST = max(RANKS)
IDS = {
    1: [0, 2, -1, 4, 4, 0, 2, 3, -1, 2],
    2: [[0, 2], [2, 0], [-1, 4], [4, 4], [1, -1], [3, 0], [2, 2]],
    3: [[0, 2, 4], [4, 4, 4], [-1, -1, -1], [2, -1, 2], [3, 1, 0]],
}


def factors(way, dtype=torch.float32, ranks=RANKS):
    """B of every adapter, and a bias of some: of one without a rank, too."""
    B = [torch.randn(O, r, device=way.device).to(dtype).requires_grad_() for r in ranks]
    bias = [torch.randn(O, device=way.device).to(dtype).requires_grad_() if i % 2 else None for i in range(len(ranks))]
    return B, bias


def bank_of(B, bias=None, scale=1.5):
    return mtk.LoraBank.from_factors([b.new_zeros(b.shape[1], 8) for b in B], B, scale, seeds=[0] * len(B), bias=bias)


def plan_of(ids, way, n=len(RANKS)):
    return mtk.group_plan(torch.as_tensor(ids, dtype=torch.int64, device=way.device), n, step=0, backend=way.backend)


def loop(s, B, bias, scale, ids, out, gates=None):
    """One position at a time."""
    ids = torch.as_tensor(ids).reshape(len(out), -1)
    s = s.reshape(*ids.shape, s.shape[-1])
    gates = torch.ones(ids.shape, device=s.device) if gates is None else gates.reshape(ids.shape)
    rows = []
    for t in range(len(out)):
        y = out[t]
        for k, i in enumerate(ids[t].tolist()):
            if i >= 0:
                delta = B[i] @ s[t, k, : B[i].shape[1]]
                y = y + gates[t, k] * scale[i] * (delta if bias[i] is None else delta + bias[i])
        rows.append(y)
    return torch.stack(rows)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("with_out", [True, False])
@pytest.mark.parametrize("n_slots", IDS)
def test_against_a_loop_over_positions(n_slots, with_out, way):
    """Several gated adapters a row, also the same one twice; gradients to s, out, B, bias, scale and gates."""
    B, bias = factors(way)
    ids = torch.as_tensor(IDS[n_slots])
    scale = (torch.rand(len(RANKS), device=way.device) + 0.5).requires_grad_()
    s, gates = (torch.randn(*shape, device=way.device, requires_grad=True) for shape in ((*ids.shape, WIDEST), ids.shape))
    out = torch.randn(len(ids), O, device=way.device, requires_grad=with_out) if with_out else None
    base = torch.zeros(len(ids), O, device=way.device) if out is None else out
    leaves = [s, gates, scale, *B, *(b for b in bias if b is not None), *([out] if with_out else [])]
    with poisoned():
        y = mtk.lora_expand(s, bank_of(B, bias, scale), plan_of(ids, way), out, gates=gates, backend=way.backend)
        plain = loop(s, B, bias, scale, ids, base, gates)
        close(y, plain)
        upstream = torch.randn_like(y)
        for ours, theirs in zip(torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(plain, leaves, upstream, allow_unused=True)):
            close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_several_adapters_does_not_see_the_batch(dtype, kernel_way):
    B, bias = factors(kernel_way, dtype)
    ids = torch.tensor(IDS[3] * 40)
    s, gates, upstream = (torch.randn(len(ids), *shape, device=kernel_way.device) for shape in ((3, WIDEST), (3,), (O,)))
    some = torch.arange(len(ids)) % 7 == 3

    def run(rows):
        leaves = [s[rows].to(dtype).requires_grad_(), gates[rows].requires_grad_()]
        y = mtk.lora_expand(leaves[0], bank_of(B, bias), plan_of(ids[rows], kernel_way), gates=leaves[1], backend=kernel_way.backend)
        return y.detach(), *torch.autograd.grad(y, leaves, upstream[rows].to(dtype))

    for alone, among in zip(run(some), run(torch.ones(len(ids), dtype=torch.bool))):
        assert torch.equal(alone, among[some])


def stored(B, bias, layout):
    """(bank in this layout, its B parameter, the parameter's gradient as [n, O, rank]); equal ranks."""
    n, rank = len(B), B[0].shape[1]
    stacked = torch.stack([b.detach() for b in B])
    options = dict(seeds=[0] * n, bias=bias)
    if layout == "packed":
        bank = mtk.LoraBank.from_packed(stacked.new_zeros(n * rank, 8), stacked.transpose(1, 2).reshape(n * rank, O), [rank] * n, 1.5, **options)
        return bank, bank.params_B[0].requires_grad_(), lambda g: g.view(n, rank, O).transpose(1, 2)
    if layout == "stacked":
        bank = mtk.LoraBank.from_stacked(stacked.new_zeros(n, rank, 8), stacked, 1.5, **options)
        return bank, bank.params_B[0].requires_grad_(), lambda g: g
    bank = mtk.LoraBank.from_experts(stacked.new_zeros(n * rank, 8), stacked.permute(1, 2, 0).reshape(O, rank * n), n, 1.5, **options)
    return bank, bank.params_B[0].requires_grad_(), lambda g: g.view(O, rank, n).permute(2, 0, 1)


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("layout", ["packed", "stacked", "experts"])
def test_layouts_give_what_separate_factors_give(layout, rank, way):
    B, bias = factors(way, ranks=(rank,) * 3)
    bank, param, unstack = stored(B, bias, layout)
    s, ids = torch.randn(9, rank, device=way.device, requires_grad=True), [0, 1, 1, -1, 2, 0, 1, 2, 2]
    upstream = torch.randn(9, O, device=way.device)
    results = []
    for b, leaves, split in ((bank_of(B, bias), B, torch.stack), (bank, [param], lambda grads: unstack(grads[0]))):
        y = mtk.lora_expand(s, b, plan_of(ids, way, 3), backend=way.backend)
        ds, dbias, *dB = torch.autograd.grad(y, [s, bias[1], *leaves], upstream)
        results.append((y.detach(), ds, dbias, split(dB)))
    for separate, other in zip(*results):
        assert torch.equal(separate, other) if way.backend == "cpu" else torch.allclose(separate, other, rtol=1e-5, atol=1e-5)


def test_frozen_adapters_get_no_gradient_and_leave_the_others_alone(way):
    B, bias = factors(way)
    s, upstream = torch.randn(10, WIDEST, device=way.device), torch.randn(10, O, device=way.device)
    leaves = [*B, bias[1], bias[3]]

    def run():
        for t in leaves:
            t.grad = None
        mtk.lora_expand(s, bank_of(B, bias), plan_of(IDS[1], way), backend=way.backend).backward(upstream)
        return [t.grad for t in leaves]

    every = run()
    for frozen in (B[2], B[3], bias[1]):  # B[3] without its bias
        frozen.requires_grad_(False)
    some = run()
    assert [g is None for g in some] == [False, False, True, True, False, True, False]
    assert all(b is None or torch.equal(a, b) for a, b in zip(every, some))


def test_strided_s_keeps_what_lies_beside_it(way):
    """Rank space of several targets side by side: each is a slice with a row stride."""
    B, bias = factors(way)
    both = torch.randn(10, 2 * WIDEST + 3, device=way.device)
    bank, plan = bank_of(B, bias), plan_of(IDS[1], way)
    s = both[:, 2 : 2 + WIDEST]
    y = mtk.lora_expand(s, bank, plan, backend=way.backend)
    assert torch.equal(y, mtk.lora_expand(s.contiguous(), bank, plan, backend=way.backend))
    run, groups = _backends.launchers("lora_expand", both, way.backend), (plan.offsets, plan.perm, plan.tiles)
    views, empty = [b.detach() for b in B], both.new_empty(0)
    biases = [empty if b is None else b.detach() for b in bias]
    nan, dy = torch.full_like(both, torch.nan), torch.randn(10, O + 5, device=way.device)[:, 3:-2]
    ds, expected = nan[:, 2 : 2 + WIDEST], torch.empty(10, WIDEST, device=way.device)
    for target in (ds, expected):
        run.lora_expand_bwd([dy], s, views, biases, [bank.scale], None, *groups, target, None, [empty] * 5, [empty] * 5)
    assert torch.equal(ds, expected) and nan[:, :2].isnan().all() and nan[:, 2 + WIDEST :].isnan().all()
    assert not ds[2].any() and not ds[0, 3:].any()


def test_wider_rank_space_and_float32_gradients_over_16_bit_factors(way):
    B, bias = factors(way, torch.bfloat16)
    bank, plan = bank_of(B, bias), plan_of(IDS[1], way)
    s, out = torch.randn(10, WIDEST, device=way.device), torch.randn(10, O, device=way.device).bfloat16()
    run, groups = _backends.launchers("lora_expand", s, way.backend), (plan.offsets, plan.perm, plan.tiles)
    empty, views = s.new_empty(0), [b.detach() for b in B]
    biases = [out.new_empty(0) if b is None else b.detach() for b in bias]
    ys = [out.clone()]
    run.lora_expand_fwd(s, views, biases, [bank.scale], None, *groups, ys)
    wide = [b.detach().float().requires_grad_() for b in B]
    wide_bias = [None if b is None else b.detach().float().requires_grad_() for b in bias]
    plain = loop(s, wide, wide_bias, bank.scale, IDS[1], out.float())
    torch.testing.assert_close(ys[0].float(), plain, rtol=1e-2, atol=1e-2)
    dy, ds = torch.randn(10, O, device=way.device).bfloat16(), torch.empty_like(s)
    dB = [torch.full((r, O), torch.nan, device=way.device).T for r in RANKS]
    dbias = [empty if b is None else torch.full((O,), torch.nan, device=way.device) for b in bias]
    run.lora_expand_bwd([dy], s, views, biases, [bank.scale], None, *groups, ds, None, dB, dbias)
    expected = torch.autograd.grad(plain, [wide[0], wide[2], wide[4], wide_bias[3]], dy.float())
    for ours, theirs in zip((dB[0], dB[2], dB[4], dbias[3]), expected):
        close(ours, theirs)
    assert not dbias[1].any()  # an adapter without rows


def test_rank_zero_with_a_bias_still_adds_it(way):
    B, bias = factors(way, ranks=(0, 0))
    s, gates = torch.randn(3, 0, device=way.device), torch.tensor([0.5, -2.0, 3.0], device=way.device, requires_grad=True)
    y = mtk.lora_expand(s, bank_of(B, bias), plan_of([1, -1, 0], way, 2), gates=gates, backend=way.backend)
    close(y, torch.stack([0.5 * 1.5 * bias[1], torch.zeros_like(bias[1]), torch.zeros_like(bias[1])]))
    upstream = torch.randn(3, O, device=way.device)
    dbias, dgates = torch.autograd.grad(y, [bias[1], gates], upstream)
    close(dbias, 0.75 * upstream[0])
    close(dgates, torch.stack([1.5 * upstream[0] @ bias[1], *torch.zeros(2, device=way.device)]).detach())


def test_no_rows(way):
    B, bias = factors(way)
    for shape in ((0,), (0, 2)):
        s = torch.randn(*shape, WIDEST, device=way.device, requires_grad=True)
        y = mtk.lora_expand(s, bank_of(B, bias), plan_of(torch.empty(shape), way), backend=way.backend)
        assert y.shape == (0, O)
        ds, dbias, *dB = torch.autograd.grad(y, [s, bias[1], *B], torch.empty_like(y))
        assert ds.shape == s.shape and not dbias.any() and not any(g.any() for g in dB)


def test_out_is_never_written(way):
    B, bias = factors(way)
    out = torch.randn(2, 5, O, device=way.device)
    before = out.clone()
    y = mtk.lora_expand(torch.randn(10, WIDEST, device=way.device), bank_of(B, bias), plan_of(IDS[1], way), out, backend=way.backend)
    assert y.shape == out.shape and torch.equal(out, before) and not torch.equal(y, out)


def test_bad_input_is_named():
    way = type("W", (), {"device": "cpu", "backend": None})
    B, bias = factors(way)
    bank, plan, s = bank_of(B, bias), plan_of(IDS[1], way), torch.randn(10, WIDEST)
    cases = [
        (ValueError, r"lora_expand: s is \(10, 32\); the plan and the bank take \(10, 33\)", lambda: mtk.lora_expand(s[:, 1:], bank, plan)),
        (ValueError, "s is list", lambda: mtk.lora_expand(s.tolist(), bank, plan)),
        (ValueError, r"the plan and the bank take \(7, 2, 33\)", lambda: mtk.lora_expand(s, bank, plan_of(IDS[2], way))),
        (ValueError, r"out is \(10, 39\); the plan and the bank give \(10, 40\)", lambda: mtk.lora_expand(s, bank, plan, torch.zeros(10, 39))),
        (ValueError, r"gates is \(10, 1\); give one per id of the plan, \(10,\)", lambda: mtk.lora_expand(s, bank, plan, gates=torch.ones(10, 1))),
        (ValueError, "the plan has 6 groups, but there are 5 adapters", lambda: mtk.lora_expand(s, bank, plan_of(IDS[1], way, 6))),
        (TypeError, "bank is a list; build one with LoraBank", lambda: mtk.lora_expand(s, B, plan)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.skipif(not _native.available(), reason=_native.reason())
def test_the_kernel_refuses_what_would_read_or_write_elsewhere():
    run, B, plan = _native.ops(), [torch.randn(6, 3), torch.randn(6, 2)], mtk.group_plan(torch.tensor([0, 1, -1, 1]), 2)
    groups, s0, y0, scale0, empty = (plan.offsets, plan.perm, plan.tiles), torch.randn(4, 3), torch.zeros(4, 6), torch.ones(2), torch.empty(0)

    def forward(s=s0, B=B, bias=(), scale=scale0, gates=None, y=y0):
        run.lora_expand_fwd(s, B, list(bias), [scale], gates, *groups, [y])

    def backward(dy=y0, ds=None, e=None, dB=None, dbias=(), bias=()):
        dB = [torch.empty_like(b) for b in B] if dB is None else dB
        run.lora_expand_bwd([dy], s0, B, list(bias), [scale0], None, *groups, torch.empty(4, 3) if ds is None else ds, e, dB, list(dbias))

    forward(), backward()
    cases = [
        (r"s is float32 \[4, 2\]", lambda: forward(s=s0[:, :2])),
        ("s is float32 .4, 3., strides .1, 4.", lambda: forward(s=torch.randn(3, 4).T)),
        ("give float32 .6, rank.", lambda: forward(B=[B[0], torch.randn(5, 2)])),
        ("float16", lambda: forward(B=[B[0], B[1].half()])),
        ("got 1 of bias", lambda: forward(bias=[torch.randn(6)])),
        (r"bias is float32 \[5\]", lambda: forward(bias=[torch.randn(5), empty])),
        ("scale is float64", lambda: forward(scale=scale0.double())),
        ("gates is float32 .3.", lambda: forward(gates=torch.ones(3))),
        ("unit stride", lambda: forward(y=torch.zeros(6, 4).T)),
        ("perm has 4 positions for 3 rows", lambda: forward(y=y0[1:])),
        ("kernels take float32", lambda: forward(y=y0.double())),
        (r"ds is float32 \[4, 4\]", lambda: backward(ds=torch.empty(4, 4))),
        ("e is float32", lambda: backward(e=torch.empty(4))),
        (r"dB is float32 \[2, 6\]", lambda: backward(dB=[empty, torch.empty(2, 6)])),
        ("the adapter has no bias", lambda: backward(dbias=[torch.empty(6), empty])),
        ("several dtypes", lambda: backward(dB=[torch.empty(6, 3), torch.empty(6, 2).half()])),
    ]
    for message, call in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(RuntimeError, match="no y; give one per target"):
        run.lora_expand_fwd(s0, B, [], [], None, *groups, [])
