"""Edges of moe_lora_linear: rows shared or own, gates, layouts, solo against mixed bits, empty and fat experts, launches, what it keeps, errors."""

import pytest
import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels.lab.interpreter import interpreting
from mtkernels.testing import assert_accurate, plain_moe_lora, poisoned

E, N, RANKS, STEP, SITE, D, O = 3, 2, (3, 0, 16, 1, 33, 8), 5, 2, 72, 104
# (expert, adapter): all but (0, 1) and (2, 0) have positions, expert 1 most of them; -1 is none.
EXPERTS = [0, 1, 1, -1, 2, 1, 0, 1, 1, 2]
ADAPTERS = [0, 1, 0, 1, 1, -1, 0, 1, 0, -1]


def table_of(way, T, K=None):
    """ids [T] or [T, K]; an adapter per row, neighbouring experts."""
    t = torch.arange(T, device=way.device)[:, None]
    k = torch.arange(K or 1, device=way.device)
    experts, adapters = torch.tensor(EXPERTS, device=way.device)[(3 * t + k) % 10], torch.tensor(ADAPTERS, device=way.device)[(t % 10).expand_as(t + k)]
    # No row of adapter 1 goes to expert 0, and none of adapter 0 to expert 2.
    experts = torch.where((experts == 0) & (adapters == 1) | (experts == 2) & (adapters == 0), 1, experts)
    ids = mtk.expert_adapter_ids(experts, adapters, N)
    return ids if K else ids[:, 0]


class Layer:
    """Experts with a bank; odd adapters have a bias. `leaves` want gradients."""

    def __init__(self, way, dtype, factor_dtype=None, dropout=0.25, ranks=RANKS, bias=True):
        self.way, factor = way, factor_dtype or dtype
        leaf = lambda *shape, std=1.0, d=factor: (std * torch.randn(*shape, device=way.device)).to(d).requires_grad_()  # noqa: E731
        self.weight, self.bias = leaf(E, O, D, std=D**-0.5, d=dtype).detach(), leaf(E, O, d=dtype).detach() if bias else None
        A, B = [leaf(r, D, std=D**-0.5) for r in ranks], [leaf(O, r) for r in ranks]
        beta = [leaf(O) if i % 2 and bias else None for i in range(len(ranks))]
        self.scale = torch.tensor([0.5 + i / 4 for i in range(len(ranks))], device=way.device, requires_grad=True)
        self.bank = mtk.LoraBank.from_factors(A, B, self.scale, dropout=dropout, seeds=list(range(len(ranks))), bias=beta)
        self.leaves = {f"A{i}": a for i, a in enumerate(A)} | {f"B{i}": b for i, b in enumerate(B)} | {"scale": self.scale}
        self.leaves |= {f"beta{i}": b for i, b in enumerate(beta) if b is not None}

    def plan(self, ids):
        return mtk.group_plan(ids, E * (N + 1), step=STEP, backend=self.way.backend)

    def __call__(self, x, ids, gates=None):
        return mtk.moe_lora_linear(x, self.weight, self.bias, self.bank, self.plan(ids), gates=gates, site=SITE, backend=self.way.backend)

    def plain(self, x, ids, gates, cast):
        bank = self.bank
        wide = mtk.LoraBank.from_factors([cast(a) for a in bank.A], [cast(b) for b in bank.B], 1.0, seeds=bank.seeds, bias=[cast(b) if b.numel() else None for b in bank.bias] or None)
        wide.threshold, wide.scale = bank.threshold, bank.scale
        return plain_moe_lora(cast(x), cast(self.weight), self.bias if self.bias is None else cast(self.bias), wide, ids, STEP, SITE, gates)


def rows(way, dtype, *shape):
    return torch.randn(*shape, device=way.device).to(dtype).requires_grad_()


def check(layer, x, ids, gates=None):
    leaves = {"x": x, **layer.leaves, **({} if gates is None else {"gates": gates})}
    with poisoned():
        y = layer(x, ids, gates)
        upstream = torch.randn(y.shape, device=y.device).to(y.dtype)
        ours = torch.autograd.grad(y, list(leaves.values()), upstream)
    plain, exact = layer.plain(x, ids, gates, lambda t: t.to(x.dtype)), layer.plain(x, ids, gates, torch.Tensor.double)
    assert y.shape == plain.shape == ((len(ids), O) if gates is not None else (*ids.shape, O)) and y.dtype == x.dtype
    theirs, right = (torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype), allow_unused=True) for out in (plain, exact))
    assert_accurate(y.detach(), plain.detach(), exact.detach(), x.dtype, "y")
    for name, a, b, c in zip(leaves, ours, theirs, right):
        assert a.dtype == leaves[name].dtype
        assert_accurate(a, a if b is None else b, torch.zeros_like(a) if c is None else c, x.dtype, name)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gates"])
@pytest.mark.parametrize("own", [False, True], ids=["shared rows", "own rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype, own, gated, way):
    T, K = 40, 3
    gates = torch.randn(T, K, device=way.device, requires_grad=True) if gated else None
    check(Layer(way, dtype), rows(way, dtype, T, K, D) if own else rows(way, dtype, T, D), table_of(way, T, K), gates)


@pytest.mark.parametrize("K", [None, 1])
def test_gates_of_one_expert_a_row(K, way, dtype):
    T = 50
    gates = torch.randn(T, *[K] * bool(K), device=way.device, requires_grad=True)
    layer, x, ids = Layer(way, dtype), rows(way, dtype, T, *[K] * bool(K), D), table_of(way, T, K)
    if K:
        return check(layer, x, ids, gates)
    expected = layer(x, ids[:, None], gates[:, None])
    assert torch.equal(layer(x, ids, gates), expected) and expected.shape == (T, O)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32)], ids=["float32 factors over bfloat16 rows"])
def test_factors_in_another_dtype(dtypes, way):
    check(Layer(way, dtypes[0], factor_dtype=dtypes[1]), rows(way, dtypes[0], 40, D), table_of(way, 40, 2), torch.randn(40, 2, device=way.device, requires_grad=True))


def test_experts_alone(way, dtype):
    """No ranks, no biases."""
    check(Layer(way, dtype, ranks=(0,) * len(RANKS), bias=False), rows(way, dtype, 20, D), table_of(way, 20, 2))


def test_one_adapter_of_one_expert_takes_every_row(way, dtype):
    """In several chunks of its gradients, but where programs are emulated."""
    T = 70 if way.slow else 1500
    check(Layer(way, dtype), rows(way, dtype, T, D), torch.full((T,), 3, device=way.device))


def run(layer, x, ids, upstream, gates=None):
    y = layer(x, ids, gates)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.leaves.values()], upstream)]


def test_a_group_alone_has_the_bits_it_has_in_company(kernel_way, dtype):
    """Results, gradient rows and parameters of each (expert, adapter); dropout counts the positions of a group."""
    T, K = 40, 2
    layer, x, ids = Layer(kernel_way, dtype), rows(kernel_way, dtype, T, K, D), table_of(kernel_way, T, K)
    upstream = torch.randn(T, K, O, device=kernel_way.device).to(dtype)
    mixed = run(layer, x, ids, upstream)
    for g in ids[ids >= 0].unique().tolist():
        t, k = (ids == g).nonzero(as_tuple=True)
        solo = run(layer, x.detach()[t, k].requires_grad_(), ids[t, k], upstream[t, k])
        assert all(torch.equal(alone, both[t, k]) for alone, both in zip(solo[:2], mixed[:2])), g
        e, a = divmod(g, N + 1)
        for name, alone, both in zip(layer.leaves, solo[2:], mixed[2:]):
            if name == "scale" and a < N:
                assert torch.equal(alone[e * N + a], both[e * N + a]), g
            elif name[-1] == str(e * N + a) and a < N:
                assert torch.equal(alone, both), (g, name)
            else:
                assert name == "scale" or not alone.any(), (g, name)


def test_gate_gradients_of_a_row_do_not_depend_on_the_batch(kernel_way, dtype):
    T, K = 50, 2
    layer, x, ids = Layer(kernel_way, dtype, dropout=0.0), rows(kernel_way, dtype, T, D), table_of(kernel_way, T, K)
    gates, upstream = torch.randn(T, K, device=kernel_way.device), torch.randn(T, O, device=kernel_way.device).to(dtype)

    def of(chosen):
        x_c, gates_c = x.detach()[chosen].requires_grad_(), gates[chosen].requires_grad_()
        y = layer(x_c, ids[chosen], gates_c)
        return [y.detach(), *torch.autograd.grad(y, [x_c, gates_c], upstream[chosen])]

    full = of(torch.arange(T))
    for chosen in (torch.arange(7, 9), torch.arange(0, T, 3), torch.arange(T - 1, -1, -1)):
        assert all(torch.equal(part, whole[chosen]) for part, whole in zip(of(chosen), full))


@pytest.mark.parametrize("layout", ["stored [E, D, O]", "experts far apart", "no unit stride", "rows and bias with strides"])
def test_layouts(layout, way, dtype):
    layer, ids, x, gates = Layer(way, dtype), table_of(way, 30, 2), rows(way, dtype, 30, D), torch.randn(30, 2, device=way.device)
    weight, upstream = layer.weight, torch.randn(30, O, device=way.device).to(dtype)
    expected = run(layer, x, ids, upstream, gates)
    if layout == "stored [E, D, O]":
        layer.weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "experts far apart":
        layer.weight = F.pad(weight, (3, 5, 2, 0, 1, 1))[1:-1, 2:, 3:-5]
    elif layout == "no unit stride":
        layer.weight = torch.stack([weight, weight], 3)[..., 0]
    else:
        layer.bias, gates = F.pad(layer.bias, (1, 2))[:, 1:-2], torch.stack([gates, gates], 2)[..., 1]
        x = F.pad(x.detach(), (1, 6))[:, 1:-6].requires_grad_()
    for ours, theirs in zip(run(layer, x, ids, upstream, gates), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2 if dtype != torch.float32 else 1e-4)


@pytest.mark.parametrize("layout", ["packed", "stacked", "experts"])
def test_banks(layout, way, dtype):
    """The bank's layout changes no bit of the result, and its gradient is that of the separate factors."""
    n, r = E * N, 4
    A, B = torch.randn(n, r, D, device=way.device).to(dtype), torch.randn(n, O, r, device=way.device).to(dtype)
    made = {
        "packed": lambda: mtk.LoraBank.from_packed(A.flatten(0, 1).requires_grad_(), B.transpose(1, 2).flatten(0, 1).requires_grad_(), [r] * n, 2.0, seeds=range(n)),
        "stacked": lambda: mtk.LoraBank.from_stacked(A.clone().requires_grad_(), B.clone().requires_grad_(), 2.0, seeds=range(n)),
        "experts": lambda: mtk.LoraBank.from_experts(A.flatten(0, 1).requires_grad_(), B.permute(1, 2, 0).flatten(1).requires_grad_(), n, 2.0, seeds=range(n)),
    }[layout]()
    layer, ids, x = Layer(way, dtype), table_of(way, 30, 2), rows(way, dtype, 30, D)
    upstream = torch.randn(30, 2, O, device=way.device).to(dtype)

    def of(bank):
        layer.bank = bank
        y = layer(x, ids)
        return y.detach(), torch.autograd.grad(y, [*bank.params_A, *bank.params_B], upstream)

    parts = mtk.LoraBank.from_factors([a.clone().requires_grad_() for a in A], [b.clone().requires_grad_() for b in B], 2.0, seeds=range(n))
    (y, (dA, dB)), (expected, grads) = of(made), of(parts)
    as_made = {"packed": lambda: dB.view(n, r, O).transpose(1, 2), "stacked": lambda: dB, "experts": lambda: dB.view(O, r, n).permute(2, 0, 1)}[layout]()
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype != torch.float32 else dict(rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(dA.view(n, r, D), torch.stack(grads[:n]), **tolerance)
    torch.testing.assert_close(as_made, torch.stack(grads[n:]), **tolerance)


def test_only_what_is_wanted(way, dtype):
    """Each gradient alone is what it is beside the others."""
    layer, ids, x = Layer(way, dtype), table_of(way, 30, 2), rows(way, dtype, 30, D)
    gates = torch.randn(30, 2, device=way.device, requires_grad=True)
    leaves, upstream = [x, gates, *layer.leaves.values()], torch.randn(30, O, device=way.device).to(dtype)
    everything = torch.autograd.grad(layer(x, ids, gates), leaves, upstream)
    for wanted in (0, 1, 4, len(layer.bank) + 4, 2 + list(layer.leaves).index("scale")):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i == wanted)
        assert torch.equal(torch.autograd.grad(layer(x, ids, gates), leaves[wanted], upstream)[0], everything[wanted])
    leaves[-1].requires_grad_(False)
    leaves[wanted].requires_grad_(False)
    assert not layer(x, ids, gates).requires_grad


def test_main_grad(way, dtype):
    layer, ids, x = Layer(way, dtype), table_of(way, 20, 2), rows(way, dtype, 20, D)
    upstream = torch.randn(20, 2, O, device=way.device).to(dtype)
    expected = run(layer, x, ids, upstream)[2:]
    for leaf in layer.leaves.values():
        leaf.main_grad = torch.ones(leaf.shape, device=way.device)
    layer.bank.main_grad = True
    layer(x, ids).backward(upstream)
    for (name, leaf), grad in zip(layer.leaves.items(), expected):
        if name != "scale":
            assert leaf.grad is None
            torch.testing.assert_close(leaf.main_grad - 1, grad.float(), rtol=1e-2, atol=2e-2)


def test_no_rows_and_no_experts(way):
    layer = Layer(way, torch.float32)
    for x, ids in ((rows(way, torch.float32, 0, D), table_of(way, 0, 2)), (rows(way, torch.float32, 4, D), torch.full((4, 2), -1, device=way.device))):
        gates = torch.ones(len(x), 2, device=way.device, requires_grad=True)
        with poisoned():
            y = layer(x, ids, gates)
            grads = torch.autograd.grad(y, [x, gates, *layer.leaves.values()], torch.randn_like(y))
        assert y.shape == (len(x), O) and not y.any() and not any(g.any() for g in grads)


def test_offsets_past_two_to_the_31(kernel_way):
    """Of an expert's weight, from the first one's."""
    dtype, far = torch.bfloat16, 2**31 + 64
    layer, ids, x = Layer(kernel_way, dtype), table_of(kernel_way, 20), rows(kernel_way, dtype, 20, D)
    two = torch.empty(far + O * D, dtype=dtype, device=kernel_way.device).as_strided((2, O, D), (far, D, 1))
    two.copy_(layer.weight[:2])
    layer.bank = mtk.LoraBank.from_factors(layer.bank.A[:4], layer.bank.B[:4], layer.scale[:4], seeds=range(4))
    ids, upstream = torch.where(ids < 6, ids, -1), torch.randn(20, O, device=kernel_way.device).to(dtype)

    def of(weight):
        y = mtk.moe_lora_linear(x, weight, None, layer.bank, mtk.group_plan(ids, 6, step=1, backend=kernel_way.backend), backend=kernel_way.backend)
        return y, torch.autograd.grad(y, x, upstream)[0]

    assert all(torch.equal(a, b) for a, b in zip(of(two), of(two.contiguous())))


@pytest.mark.skipif(not interpreting(), reason="counted by the probe, in Triton's interpreter")
def test_launches(way, way_is_open):
    layer, ids = Layer(way, torch.float32), table_of(way, 20, 2)
    layer.scale.requires_grad_(False)
    leaves, plan, launches = [t for name, t in layer.leaves.items() if name != "scale"], layer.plan(ids), way_is_open.launches
    forward, backward = ["_lora_shrink_kernel", "_moe_fwd_kernel"], ["_lora_expand_bwd_kernel", "_lora_grad_a_kernel", "_lora_bwd_finish_kernel", "_moe_dx_kernel"]
    for own, gated, more, more_backward in ((True, False, [], []), (False, False, [], ["_moe_sum_kernel"]), (True, True, ["_moe_sum_kernel"], ["_moe_gate_grad_kernel"])):
        x, gates = rows(way, torch.float32, 20, *[2] * own, D), torch.ones(20, 2, requires_grad=True) if gated else None
        begin = len(launches)
        y = mtk.moe_lora_linear(x, layer.weight, layer.bias, layer.bank, plan, gates=gates, backend=way.backend)
        middle = len(launches)
        torch.autograd.grad(y, [x, *leaves, *([gates] if gated else [])], torch.randn_like(y))
        kernels = [launch.kernel for launch in launches[begin:]]
        assert kernels[: middle - begin] == forward + more and kernels[middle - begin :] == backward + more_backward


def test_what_is_kept_for_backward(way, dtype):
    layer, ids, x = Layer(way, dtype), table_of(way, 40, 3), rows(way, dtype, 40, D)
    plan, gates, kept = layer.plan(ids), torch.ones(40, 3, device=way.device, requires_grad=True), {}
    given = {t.data_ptr() for t in (x, gates, layer.weight, layer.bias, *layer.bank.tensors(), *plan.tensors())}

    def keep(t):
        kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        mtk.moe_lora_linear(x, layer.weight, layer.bias, layer.bank, plan, gates=gates, backend=way.backend)
    made = [t.shape for pointer, t in kept.items() if t.numel() and pointer not in given]
    assert made == [(40 * 3, max(RANKS))]


def test_ids_of_experts_and_adapters():
    experts = torch.tensor([[0, 2], [1, -1], [3, 0]], dtype=torch.int32)
    assert mtk.expert_adapter_ids(experts, torch.tensor([1, -1, 0]), 2).tolist() == [[1, 7], [5, -1], [9, 0]]
    assert mtk.expert_adapter_ids(experts[:, 0], torch.tensor([0, 1, -1]), 2).tolist() == [0, 4, 11]
    assert mtk.expert_adapter_ids(experts, torch.tensor([[0, 1], [-1, 0], [1, 1]]), 2).tolist() == [[0, 7], [5, -1], [10, 1]]
    beyond = mtk.expert_adapter_ids(experts, torch.tensor([0, 2, 0]), 2)
    with pytest.raises(IndexError, match=r"group_plan: ids\[2\] is"):
        mtk.group_plan(beyond, 12)
    assert mtk.group_plan(beyond, 12, out_of_range="drop").ids.tolist() == [0, 6, -1, -1, 9, 0]
    for bad in (torch.zeros(2), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match="give one per row, or one per expert"):
            mtk.expert_adapter_ids(experts, bad.long(), 2)
    with pytest.raises(ValueError, match="n_adapters is 0"):
        mtk.expert_adapter_ids(experts, torch.zeros(3).long(), 0)


def test_bad_input_is_named():
    A, B = [torch.randn(2, 8)] * 4, [torch.randn(6, 2)] * 4
    bank, weight, x = mtk.LoraBank.from_factors(A, B, 1.0), torch.randn(2, 6, 8), torch.randn(5, 8)
    plan, call = mtk.group_plan(torch.zeros(5, 3).long(), 6), mtk.moe_lora_linear
    cases = [
        (ValueError, "weight requires grad, but the experts are frozen.*weight.detach", lambda: call(x, weight.clone().requires_grad_(), None, bank, plan)),
        (ValueError, "bias requires grad, but the experts are frozen", lambda: call(x, weight, torch.zeros(2, 6, requires_grad=True), bank, plan)),
        (ValueError, r"weight is \(6, 8\), the bank maps 8 -> 6; weight is \[E, 6, 8\]", lambda: call(x, weight[0], None, bank, plan)),
        (ValueError, "the bank has 4 adapters for 3 experts", lambda: call(x, torch.randn(3, 6, 8), None, bank, plan)),
        (ValueError, r"bias is \(6,\); give \(2, 6\)", lambda: call(x, weight, torch.zeros(6), bank, plan)),
        (ValueError, "the plan has 4 groups, but there are 6 of 2 experts, each with 2 adapters or none", lambda: call(x, weight, None, bank, mtk.group_plan(torch.zeros(5).long(), 4))),
        (ValueError, "the plan covers 5 rows, but the input has 4", lambda: call(x[:4], weight, None, bank, plan)),
        (ValueError, r"x is \(5, 2, 8\) for ids \(5, 3\); give a row per id, \(5, 3, 8\), or per row, \(5, 8\)", lambda: call(torch.randn(5, 2, 8), weight, None, bank, plan)),
        (ValueError, r"gates is \(5,\); give one per id of the plan, \(5, 3\)", lambda: call(x, weight, None, bank, plan, gates=torch.ones(5))),
        (TypeError, "weight is torch.float16, x is torch.float32", lambda: call(x, weight.half(), None, bank, plan)),
        (ValueError, "the bank takes 8 features", lambda: call(x[:, :7], weight, None, bank, plan)),
        (TypeError, "bank is a list", lambda: call(x, weight, None, A, plan)),
    ]
    for error, message, bad in cases:
        with pytest.raises(error, match=message):
            bad()
    with torch.no_grad():
        assert call(x, weight.clone().requires_grad_(), None, bank, plan).shape == (5, 3, 6)
