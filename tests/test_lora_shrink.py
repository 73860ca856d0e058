"""Edges and errors of lora_shrink."""

import pytest
import torch

import mtkernels as mtk
from mtkernels import _backends, _native
from mtkernels.reference.philox import keep_mask
from mtkernels.testing import poisoned

D, RANKS = 40, (3, 0, 16, 1, 33)
DROPOUT, STEP, SITE = (0.25, 0.0, 0.5, 1.0, 0.05), 7, 4
IDS = {
    1: [0, 2, -1, 4, 4, 0, 2, 3, -1, 2],
    2: [[0, 2], [2, 0], [-1, 4], [4, 4], [1, -1], [3, 0], [2, 2]],
    3: [[0, 2, 4], [4, 4, 4], [-1, -1, -1], [2, -1, 2], [3, 1, 0]],
}


def factors(way, dtype=torch.float32, ranks=RANKS):
    return [torch.randn(r, D, device=way.device).to(dtype).requires_grad_() for r in ranks]


def bank_of(A, dropout=DROPOUT):
    return mtk.LoraBank.from_factors(A, [a.new_zeros(8, len(a)) for a in A], 1.0, dropout=list(dropout), seeds=list(range(len(A))))


def plan_of(ids, way, n=len(RANKS)):
    return mtk.group_plan(torch.as_tensor(ids, dtype=torch.int64, device=way.device), n, step=STEP, backend=way.backend)


def loop(x, A, ids, dropout=DROPOUT):
    """One position at a time: its row, its place in the adapter's own order, its mask."""
    ids, seen, parts = torch.as_tensor(ids).reshape(len(x), -1), [0] * len(A), []
    for t, i in ((t, int(i)) for t in range(len(x)) for i in ids[t]):
        s = x.new_zeros(max(len(a) for a in A))
        if i >= 0:
            threshold = round(dropout[i] * 65536)
            keep = keep_mask(seen[i] + 1, D, threshold, i, torch.tensor(STEP), SITE, "cpu")[-1].to(x.device)
            row = x[t] * keep * (65536 / (65536 - threshold) if threshold < 65536 else 0.0)
            s = torch.cat([A[i] @ row, s[len(A[i]) :]])
            seen[i] += 1
        parts.append(s)
    return torch.stack(parts).view(*ids.shape, -1)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_slots", IDS)
def test_against_a_loop_over_positions(n_slots, way):
    """Several adapters a row, also the same one twice; masks follow each adapter's own order of positions."""
    x, A = torch.randn(len(IDS[n_slots]), D, device=way.device, requires_grad=True), factors(way)
    with poisoned():
        s = mtk.lora_shrink(x, bank_of(A), plan_of(IDS[n_slots], way), site=SITE, backend=way.backend)
        plain = loop(x, A, IDS[n_slots]).reshape(s.shape)
        close(s, plain)
        assert not s.detach()[plain.detach() == 0].any()  # right of the rank, and where no adapter is
        upstream = torch.randn_like(s)
        for ours, theirs in zip(torch.autograd.grad(s, [x, *A], upstream), torch.autograd.grad(plain, [x, *A], upstream, allow_unused=True)):
            close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_a_row_of_several_adapters_does_not_see_the_batch(kernel_way):
    """Without dropout, whose masks follow the order of positions."""
    A, ids = factors(kernel_way), torch.tensor(IDS[3] * 40)
    x, upstream = torch.randn(len(ids), D, device=kernel_way.device), torch.randn(len(ids), 3, max(RANKS), device=kernel_way.device)
    some = torch.arange(len(ids)) % 7 == 3

    def run(rows):
        leaf = x[rows].requires_grad_()
        s = mtk.lora_shrink(leaf, bank_of(A), plan_of(ids[rows], kernel_way), training=False, backend=kernel_way.backend)
        return s.detach(), torch.autograd.grad(s, leaf, upstream[rows])[0]

    for alone, among in zip(run(some), run(torch.ones(len(ids), dtype=torch.bool))):
        assert torch.equal(alone, among[some])


def stored(A, layout):
    """(bank in this layout, its A parameter); equal ranks."""
    n, rank = len(A), len(A[0])
    joined = torch.cat([a.detach() for a in A])
    options = dict(dropout=[0.25] * n, seeds=list(range(n)))
    if layout == "packed":
        bank = mtk.LoraBank.from_packed(joined, joined.new_zeros(n * rank, 8), [rank] * n, 1.0, **options)
    elif layout == "stacked":
        bank = mtk.LoraBank.from_stacked(joined.view(n, rank, D), joined.new_zeros(n, 8, rank), 1.0, **options)
    else:
        bank = mtk.LoraBank.from_experts(joined, joined.new_zeros(8, n * rank), n, 1.0, **options)
    return bank, bank.params_A[0].requires_grad_()


@pytest.mark.parametrize("layout", ["packed", "stacked", "experts"])
def test_layouts_give_what_separate_factors_give(layout, way):
    A = factors(way, ranks=(5, 5, 5))
    bank, param = stored(A, layout)
    x, ids = torch.randn(9, D, device=way.device, requires_grad=True), [0, 1, 1, -1, 2, 0, 1, 2, 2]
    upstream = torch.randn(9, 5, device=way.device)
    results = []
    for b, leaves in ((bank_of(A, [0.25] * 3), A), (bank, [param])):
        s = mtk.lora_shrink(x, b, plan_of(ids, way, 3), site=SITE, backend=way.backend)
        dx, *dA = torch.autograd.grad(s, [x, *leaves], upstream)
        results.append((s.detach(), dx, torch.cat([g.reshape(-1, D) for g in dA])))
    for separate, other in zip(*results):
        assert torch.equal(separate, other) if way.backend == "cpu" else torch.allclose(separate, other, rtol=1e-5, atol=1e-5)


def test_frozen_adapters_get_no_gradient_and_leave_the_others_alone(way):
    x, A = torch.randn(10, D, device=way.device), factors(way)
    upstream = torch.randn(10, max(RANKS), device=way.device)

    def run():
        s = mtk.lora_shrink(x, bank_of(A), plan_of(IDS[1], way), backend=way.backend)
        for a in A:
            a.grad = None
        s.backward(upstream)
        return [a.grad for a in A]

    every = run()
    A[2].requires_grad_(False)
    assert A[2].grad is not None
    some = run()
    assert some[2] is None and all(torch.equal(a, b) for a, b in zip(every[3:] + every[:2], some[3:] + some[:2]))


def launch(way, x, A, ids, n_targets=1, sites=(SITE,), dropout=DROPOUT):
    """(forward, backward) of the launchers with everything but the tensors at stake filled in."""
    run, plan, n = _backends.launchers("lora_shrink", x, way.backend), plan_of(ids, way), len(A) // n_targets
    threshold = [torch.tensor([round(p * 65536) for p in dropout], dtype=torch.int32, device=way.device)] * n_targets
    seeds = [torch.arange(n, device=way.device)] * n_targets
    rest = (threshold, seeds, plan.offsets, plan.perm, plan.tiles, plan.step, list(sites), True)
    return lambda: run.lora_shrink_fwd(x, A, *rest), lambda ds, dx, dA: run.lora_shrink_bwd(ds, x, A, *rest, dx, dA)


def test_strides_float32_gradients_and_gradients_nobody_wants(way):
    wide = torch.randn(10, D + 9, device=way.device).to(torch.float16)
    x, A = wide[:, 5 : 5 + D], [a.detach() for a in factors(way, torch.float16)]
    forward, backward = launch(way, x, A, IDS[1])
    ds = torch.randn(10, 2 * max(RANKS), device=way.device).to(torch.float16)[:, : max(RANKS)]
    dx = torch.randn(10, D + 3, device=way.device).to(torch.float16)
    start = dx.clone()
    dA = [torch.full((r, D + 2), torch.nan, device=way.device)[:, 1:-1] for r in RANKS]
    unwanted = [g if i != 2 else g.new_empty(0) for i, g in enumerate(dA)]
    backward(ds, dx[:, 2:-1], unwanted)
    assert torch.equal(dx[:, :2], start[:, :2]) and torch.equal(dx[:, -1:], start[:, -1:]) and dA[2].isnan().all()
    rows, factors32 = x.float().requires_grad_(), [a.float().requires_grad_() for a in A]
    plain = loop(rows, factors32, IDS[1]).view(10, -1)
    torch.testing.assert_close(forward().float(), plain, rtol=2e-3, atol=2e-2)
    expected = torch.autograd.grad(plain, [rows, *factors32], ds.float(), allow_unused=True)
    torch.testing.assert_close(dx[:, 2:-1].float(), start[:, 2:-1].float() + expected[0], rtol=4e-3, atol=4e-2)
    for i in (0, 3, 4):
        assert dA[i].dtype == torch.float32
        close(dA[i], expected[1 + i])


def test_targets_share_x(way):
    """Two targets in one call are two calls side by side, whether or not they share a mask."""
    x = torch.randn(10, D, device=way.device)
    A = [a.detach() for a in (*factors(way), *factors(way, ranks=(2, 5, 0, 8, 4)))]
    for sites in ((SITE, SITE), (SITE, 1)):
        forward, backward = launch(way, x, A, IDS[1], 2, sites)
        parts = [launch(way, x, A[5 * g : 5 * g + 5], IDS[1], 1, sites[g : g + 1]) for g in range(2)]
        ds, dx, dA = torch.randn(10, 33 + 8, device=way.device), torch.zeros_like(x), [torch.empty_like(a) for a in A]
        close(forward(), torch.cat([f() for f, _ in parts], 1))
        backward(ds, dx, dA)
        own_dx, own_dA = torch.zeros_like(x), [torch.empty_like(a) for a in A]
        for g, (_, b) in enumerate(parts):
            b(ds[:, 33 * g : 33 + 8 * g], own_dx, own_dA[5 * g : 5 * g + 5])
        close(dx, own_dx)
        for mine, own in zip(dA, own_dA):
            close(mine, own)


@pytest.mark.parametrize("step", [1, 2], ids=["dense", "every other column"])
def test_no_rows(step, way):
    A = factors(way)
    x = torch.randn(0, step * D, device=way.device)[:, ::step].requires_grad_()
    for shape in ((0,), (0, 2)):
        s = mtk.lora_shrink(x, bank_of(A), plan_of(torch.empty(shape), way), backend=way.backend)
        assert s.shape == (*shape, 33)
        dx, *dA = torch.autograd.grad(s, [x, *A], torch.empty_like(s))
        assert dx.shape == x.shape and not any(g.any() for g in dA)


def test_rank_zero_alone(way):
    A = factors(way, ranks=(0, 0))
    x = torch.randn(3, D, device=way.device, requires_grad=True)
    s = mtk.lora_shrink(x, bank_of(A, [0.5, 0]), plan_of([0, 1, -1], way, 2), backend=way.backend)
    assert s.shape == (3, 0) and not torch.autograd.grad(s, x, s)[0].any()


def test_bad_input_is_named():
    A, x = [torch.randn(r, D) for r in RANKS], torch.randn(4, D)
    bank, plan = bank_of(A), mtk.group_plan(torch.tensor([0, 1, -1, 2]), 5)
    cases = [
        (TypeError, "lora_shrink: x is torch.int64; give float32", lambda: mtk.lora_shrink(x.long(), bank, plan)),
        (ValueError, r"x is \(4, 39\), the bank takes 40 features", lambda: mtk.lora_shrink(x[:, 1:], bank, plan)),
        (ValueError, "x is on meta, the bank on cpu", lambda: mtk.lora_shrink(x.to("meta"), bank, plan)),
        (ValueError, "the plan covers 4 rows, but the input has 3", lambda: mtk.lora_shrink(x[1:], bank, plan)),
        (ValueError, "the plan has 6 groups, but there are 5 adapters", lambda: mtk.lora_shrink(x, bank, mtk.group_plan(plan.ids, 6))),
        (TypeError, "bank is a list; build one with LoraBank", lambda: mtk.lora_shrink(x, A, plan)),
        (TypeError, "plan is a Tensor; build one with group_plan", lambda: mtk.lora_shrink(x, bank, plan.ids)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.skipif(not _native.available(), reason=_native.reason())
def test_the_kernel_refuses_what_would_read_or_write_elsewhere():
    run, x, A, plan = _native.ops(), torch.randn(4, D), [torch.randn(3, D), torch.randn(2, D)], mtk.group_plan(torch.tensor([0, 1, -1, 1]), 2)
    threshold, seeds = [torch.zeros(2, dtype=torch.int32)], [torch.arange(2)]

    def forward(x=x, A=A, threshold=threshold, seeds=seeds, offsets=plan.offsets, perm=plan.perm, sites=(0,)):
        run.lora_shrink_fwd(x, A, threshold, seeds, offsets, perm, plan.tiles, plan.step, list(sites), True)

    def backward(ds=torch.randn(4, 3), dx=None, dA=None):
        dA = [torch.empty_like(a) for a in A] if dA is None else dA
        run.lora_shrink_bwd(ds, x, A, threshold, seeds, plan.offsets, plan.perm, plan.tiles, plan.step, [0], True, dx, dA)

    forward(), backward()
    empty = torch.empty(0)
    cases = [
        ("unit stride", lambda: forward(x=torch.randn(D, 4).T)),
        ("give float32 .rank, 40.", lambda: forward(A=[A[0], torch.randn(2, 39)])),
        ("unit stride", lambda: forward(A=[A[0], torch.randn(D, 2).T])),
        ("float16", lambda: forward(A=[A[0], A[1].half()])),
        ("give a contiguous int32", lambda: forward(threshold=[threshold[0].long()])),
        ("seeds is int64 .1.", lambda: forward(seeds=[seeds[0][:1]])),
        ("got 2 of threshold; give one per target, 1", lambda: forward(threshold=threshold * 2)),
        ("2 factors for 0 targets", lambda: forward(sites=())),
        ("offsets must rise", lambda: forward(offsets=plan.offsets.flip(0))),
        ("perm must hold", lambda: forward(perm=plan.perm + 1)),
        ("perm has 3 positions for 4 rows", lambda: forward(perm=torch.arange(3, dtype=torch.int32), offsets=torch.tensor([0, 1, 2], dtype=torch.int32))),
        ("kernels take float32", lambda: forward(x=x.double())),
        (r"ds is float32 \[4, 2\]", lambda: backward(ds=torch.randn(4, 2))),
        ("dx is float16", lambda: backward(dx=x.half())),
        (r"dx is float32 \[3, 40\]", lambda: backward(dx=x[1:])),
        ("got 1 of dA", lambda: backward(dA=[empty])),
        (r"dA is float32 \[2, 40\]", lambda: backward(dA=[torch.empty(2, D), empty])),
        ("several dtypes", lambda: backward(dA=[torch.empty(3, D), torch.empty(2, D).half()])),
    ]
    for message, call in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
